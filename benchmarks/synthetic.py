"""Synthetic rows with a known kind of spectrum, and the float64 reference for them.

Shapes: n rows of a batch, d features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def rotate(rows_nd: Tensor, *, seed: int) -> Tensor:
    """Return rows in a random rotation, (n, d): Hartley transforms, which are orthogonal, between random signs.

    Cost O(n d log d), where a random orthogonal matrix would take O(d³) to make and O(n d²) to apply.
    """
    generator = torch.Generator().manual_seed(seed)
    n_features = rows_nd.shape[1]
    for _ in range(3):
        signs_d = torch.randint(0, 2, (n_features,), generator=generator) * 2 - 1
        waves_nd = torch.fft.fft(rows_nd * signs_d)
        rows_nd = (waves_nd.real - waves_nd.imag) / n_features**0.5
    return rows_nd


def synthetic_batches(n_batches: int, *, rows: int, width: int, seed: int = 0) -> list[Tensor]:
    """Return different batches (n, d) of one distribution: deviations i^-0.5 in a random rotation, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    deviations_d = torch.arange(1, width + 1).float().rsqrt()
    mean_d = 3 * deviations_d.square().mean().sqrt() * torch.randn(width, generator=generator)
    batches = (torch.randn(rows, width, generator=generator) for _ in range(n_batches))
    return [(rotate(noise_nd * deviations_d, seed=seed) + mean_d).contiguous() for noise_nd in batches]


def scatter_matrix(batches: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Return the float64 scatter matrix (d, d) about the mean of the batches that were seen, in this order."""
    n_features = batches[0].shape[1]
    scatter_dd = torch.zeros(n_features, n_features, dtype=torch.float64)
    sum_d, n_rows = torch.zeros(n_features, dtype=torch.float64), 0
    for index, times in Counter(order).items():
        rows_nd = batches[index].double()
        scatter_dd += times * (rows_nd.T @ rows_nd)
        sum_d += times * rows_nd.sum(dim=0)
        n_rows += times * len(rows_nd)
    return scatter_dd - torch.outer(sum_d, sum_d) / n_rows
