"""Incremental PCA, Algorithm 2 of the paper (Ross et al. 2008): merge a truncated SVD with every batch.

Shapes: n rows, d features, k components.

The reference for the other backends and the closest to published runs. Each batch needs an SVD,
O((n + k) d min(n + k, d)), and what is truncated is forgotten, so the result depends on the order of batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.pca.moments import Moments
from evatune.pca.sketch import merge_eigenpairs
from evatune.pca.subspace import solver_copy


class IncrementalState:
    """The truncated SVD of the centred rows so far: right-singular vectors and singular values."""

    def __init__(self, components_kd: Tensor, singular_values_k: Tensor, *, n_components: int) -> None:
        self.components_kd = components_kd
        self.singular_values_k = singular_values_k
        self.n_components = n_components

    @classmethod
    def start(cls, first_nd: Tensor, n_components: int) -> IncrementalState:
        """Return the empty state for rows like these, (n, d)."""
        return cls(first_nd.new_zeros(0, first_nd.shape[1]), first_nd.new_zeros(0), n_components=n_components)

    def update(
        self, shifted_nd: Tensor, moments: Moments, *, center: bool, product_dtype: torch.dtype
    ) -> IncrementalState:
        """Add shifted rows, (n, d), and return this state; `moments` include them already."""
        n_batch = shifted_nd.shape[0]
        n_before = moments.n_rows - n_batch
        if center:
            batch_mean_d = shifted_nd.mean(dim=0)
            # Line 6 of Algorithm 2: the difference between the old mean and the batch's, as one more row.
            mean_before_d = (moments.sum_d - batch_mean_d * n_batch) / max(n_before, 1)
            weight = (n_before * n_batch / moments.n_rows) ** 0.5
            correction_1d = (weight * (mean_before_d - batch_mean_d))[None].to(shifted_nd)
            rows_nd = torch.cat([shifted_nd - batch_mean_d, correction_1d])
        else:
            rows_nd = shifted_nd
        # Equations 4 and 5: the SVD of old and new rows together needs of the old ones only Σ Vᵀ.
        stacked = torch.cat([self.singular_values_k[:, None] * self.components_kd, rows_nd])
        _, values, components = torch.linalg.svd(stacked, full_matrices=False)
        n_kept = min(self.n_components, int((values > values[0] * torch.finfo(values.dtype).eps).sum()))
        self.components_kd, self.singular_values_k = components[:n_kept], values[:n_kept]
        return self

    def decompose(self, moments: Moments, *, center: bool) -> tuple[Tensor, Tensor]:
        """Return the components in columns (d, p) and the eigenvalues of the scatter matrix (p,), descending."""
        return solver_copy(self.components_kd.T), solver_copy(self.singular_values_k).square()

    def merged(self, other: IncrementalState, mine: Moments, theirs: Moments, *, center: bool) -> IncrementalState:
        """Return the state of both sets of rows, truncated to the components kept."""
        vectors_dp, values_p = merge_eigenpairs(
            self.decompose(mine, center=center), other.decompose(theirs, center=center), mine, theirs, center=center
        )
        kept_dk, values_k = vectors_dp[:, : self.n_components], values_p[: self.n_components]
        return IncrementalState(
            kept_dk.T.contiguous().to(self.components_kd),
            values_k.sqrt().to(self.singular_values_k),
            n_components=self.n_components,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors."""
        return {
            "components": self.components_kd,
            "singular_values": self.singular_values_k,
            "n_components": torch.tensor(self.n_components),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> IncrementalState:
        """Return the state that `tensors` describes."""
        return cls(tensors["components"], tensors["singular_values"], n_components=int(tensors["n_components"]))
