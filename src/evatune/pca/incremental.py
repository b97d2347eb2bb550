"""Incremental PCA, Algorithm 2 of the paper (Ross et al. 2008): merge a truncated SVD with every batch.

Shapes: n rows, d features, k components, p <= k of them that vary.

The reference for the other backends and the closest to published runs. Each batch needs an SVD,
O((n + k) d min(n + k, d)), and what is truncated is forgotten, so the result depends on the order of batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from evatune.pca.backend import Pairs, State, Wanted, merge_eigenpairs
from evatune.pca.cost import FLOAT, Cost, components_bytes, moments_bytes
from evatune.pca.moments import Moments
from evatune.pca.subspace import solver_copy
from evatune.pca.together import Steps


class IncrementalState(State):
    """The truncated SVD of the centred rows so far.

    Args:
        wanted: what is asked for.
        moments: count, mean and variance of the rows.
        components_pd: right-singular vectors in rows, (p, d).
        singular_values_p: (p,), descending.
    """

    name = "incremental"

    def __init__(self, wanted: Wanted, moments: Moments, components_pd: Tensor, singular_values_p: Tensor) -> None:
        super().__init__(wanted, moments)
        self.components_pd = components_pd
        self.singular_values_p = singular_values_p

    @classmethod
    def start(cls, wanted: Wanted, moments: Moments) -> Self:
        """Return the state of no rows: no vectors."""
        return cls(wanted, moments, moments.shift_d.new_zeros(0, len(moments.shift_d)), moments.shift_d.new_zeros(0))

    @property
    def n_kept(self) -> int:
        """How many vectors are kept."""
        return self.n_components

    def update(self, shifted_nd: Tensor, *, product_dtype: torch.dtype) -> None:
        """Add shifted rows, (n, d), by an SVD of them; `moments` include them already."""
        n_batch, n_rows = shifted_nd.shape[0], self.moments.n_rows
        n_before = n_rows - n_batch
        if self.center:
            batch_mean_d = shifted_nd.mean(dim=0)
            # Line 6 of Algorithm 2: the difference between the old mean and the batch's, as one more row.
            mean_before_d = (self.moments.sum_d - batch_mean_d * n_batch) / max(n_before, 1)
            weight = (n_before * n_batch / n_rows) ** 0.5
            correction_1d = (weight * (mean_before_d - batch_mean_d))[None].to(shifted_nd)
            rows_nd = torch.cat([shifted_nd - batch_mean_d, correction_1d])
        else:
            rows_nd = shifted_nd
        # Equations 4 and 5: of the old rows, the SVD of all rows together needs only Σ Vᵀ.
        stacked = torch.cat([self.singular_values_p[:, None] * self.components_pd, rows_nd])
        _, values, components = torch.linalg.svd(stacked, full_matrices=False)
        n_kept = min(self.n_kept, int((values > values[0] * torch.finfo(values.dtype).eps).sum()))
        # Copies, since a slice would keep all vectors of the decomposition in memory.
        self.components_pd, self.singular_values_p = components[:n_kept].clone(), values[:n_kept].clone()

    @property
    def is_due(self) -> bool:
        """False: no work is left."""
        return False

    def settle(self) -> Steps[State]:
        """Return this state."""
        yield from ()
        return self

    def refresh(self) -> Steps[None]:
        """Do nothing: there is no smaller form."""
        yield from ()

    def eigenpairs(self, n_pairs: int, *, rough: bool = False) -> Steps[Pairs]:
        """Return what is kept, in float64."""
        yield from ()
        return solver_copy(self.components_pd.T), solver_copy(self.singular_values_p).square()

    def missed(self) -> Steps[float]:
        """Return NaN: what was truncated is not known."""
        yield from ()
        return math.nan

    def merged(self, other: Self) -> Self:
        """Return the state of both sets of rows, truncated to the vectors that are kept."""
        vectors_dp, values_p = merge_eigenpairs(self, other)
        return type(self)(
            self.wanted,
            self.moments.merged(other.moments),
            vectors_dp[:, : self.n_kept].T.contiguous().to(self.components_pd),
            values_p[: self.n_kept].sqrt().to(self.singular_values_p),
        )

    def exactly(self) -> None:
        """Return None: what was truncated is not known."""

    def condensed(self) -> State:
        """Return this state, which is small."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors."""
        own = {"components": self.components_pd, "singular_values": self.singular_values_p}
        return self.moments.tensors() | own

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], wanted: Wanted) -> Self:
        """Return the state that `tensors` describes."""
        return cls(wanted, Moments.from_tensors(tensors), tensors["components"], tensors["singular_values"])

    @classmethod
    def cost(cls, n_components: int, n_features: int) -> Cost:
        """Return the cost of k vectors."""
        k, d = n_components, n_features
        state_bytes = FLOAT * (k * d + k) + moments_bytes(d)
        return Cost(
            backend=cls.name,
            state_bytes=state_bytes,
            initial_bytes=state_bytes,
            cached_bytes=components_bytes(k, d),
        )
