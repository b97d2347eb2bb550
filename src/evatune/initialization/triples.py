"""A few singular triples of a matrix, from the eigenvectors of its smaller Gram matrix.

Only r of them are wanted, so a whole singular value decomposition would be a waste. Squaring the matrix costs half the
digits, hence float64 inside.

Shapes: o rows, d columns, r triples.
"""

from __future__ import annotations

import torch
from torch import Tensor


def singular_triples(matrix_od: Tensor, rank: int, *, smallest: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest or smallest singular values, descending, and their vectors.

    Args:
        matrix_od: shape (o, d), any float dtype.
        rank: r, at most the smaller side.
        smallest: the last r instead of the first r.

    Returns:
        U of shape (o, r), S of shape (r,) and V^T of shape (r, d) in float64; where a singular value is zero, the
        vector on the larger side is zero.

    Cost: O(o d min(o, d)), mostly one matrix product.
    """
    matrix_od = matrix_od.detach().double()
    o, d = matrix_od.shape
    is_tall = d <= o
    gram = matrix_od.T @ matrix_od if is_tall else matrix_od @ matrix_od.T
    vectors = torch.linalg.eigh(gram)[1].flip(1)  # descending
    near = vectors[:, -rank:] if smallest else vectors[:, :rank]
    far = matrix_od @ near if is_tall else matrix_od.T @ near
    S_r = far.norm(dim=0)
    far = far / torch.where(S_r > 0, S_r, 1.0)
    return (far, S_r, near.T) if is_tall else (near, S_r, far.T)
