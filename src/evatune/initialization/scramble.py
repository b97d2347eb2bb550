"""Ablations of EVA's directions: rotate, reorder or shuffle the rows of `A` (Table 26).

Shapes: r rank, d input features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(A_rd: Tensor, *, seed: int = 0) -> Tensor:
    """Return Q A with a random orthogonal r x r matrix Q: other directions in the same span (EVA-rot).

    EVA's rows are orthonormal, so the new ones are too. A^T A and the span do not change.

    Args:
        A_rd: shape (rank, in_features).
        seed: of Q, which is uniform over all orthogonal matrices (Haar).

    Cost: O(rank^2 * in_features).
    """
    r = len(A_rd)
    Q_rr, R_rr = torch.linalg.qr(torch.randn(r, r, generator=_generator(seed), dtype=torch.float64, device="cpu"))
    Q_rr = Q_rr * R_rr.diagonal().sign()  # without this, the QR decomposition's choice of signs is not uniform
    return (Q_rr.to(A_rd) @ A_rd).contiguous()


def permuted(A_rd: Tensor, *, seed: int = 0) -> Tensor:
    """Return the same rows in random order (EVA-perm).

    B starts from zero and an optimizer treats all rows alike, so results differ by rounding only: this is a control.

    Args:
        A_rd: shape (rank, in_features).
        seed: of the order.

    Cost: O(rank * in_features).
    """
    order = torch.randperm(len(A_rd), generator=_generator(seed), device="cpu")
    return A_rd[order.to(A_rd.device)].contiguous()


def shuffled(A_rd: Tensor, *, seed: int = 0) -> Tensor:
    """Return the matrix with the entries of each column in random order: same entries, other directions (EVA-shuffle).

    The authors' published image-classification code calls this a permutation. It fits the paper's statement that the
    permutation keeps the scale but changes directions and row norms.

    Args:
        A_rd: shape (rank, in_features).
        seed: of the orders.

    Cost: O(rank log(rank) * in_features).
    """
    order = torch.rand(A_rd.shape, generator=_generator(seed), dtype=torch.float64, device="cpu").argsort(dim=0)
    return A_rd.gather(0, order.to(A_rd.device)).contiguous()


def random_rows(rank: int, in_features: int, *, seed: int = 0) -> Tensor:
    """Return plain LoRA's random `A`: uniform in ±1/sqrt(in_features), as PEFT starts it (LoRA-redist).

    Args:
        rank: rows.
        in_features: columns.
        seed: of the rows.

    Cost: O(rank * in_features).
    """
    return (2 * torch.rand(rank, in_features, generator=_generator(seed), device="cpu") - 1) / in_features**0.5


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
