"""Exact streaming PCA: accumulate the second moment S = Σ z zᵀ, (d, d), of the shifted rows z = x - shift.

Shapes: n rows, d features, k components.

Batch order, batch size and rank do not matter to the result, beyond rounding. One matrix product of O(n d²) a batch,
one symmetric eigenproblem of O(d³) whenever components are asked for. Right for inputs of moderate width, and the
oracle of the other backends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.pca.moments import Moments
from evatune.pca.subspace import solver_copy


class ExactState:
    """The second moment of the shifted rows."""

    def __init__(self, second_moment_dd: Tensor) -> None:
        self.second_moment_dd = second_moment_dd

    @classmethod
    def start(cls, first_nd: Tensor) -> ExactState:
        """Return the empty state for rows like these, (n, d)."""
        n_features = first_nd.shape[1]
        return cls(first_nd.new_zeros(n_features, n_features))

    def update(self, shifted_nd: Tensor, moments: Moments, *, center: bool, product_dtype: torch.dtype) -> None:
        """Add shifted rows, (n, d)."""
        # Always in full precision: a product rounded to bfloat16 is wrong by more than the small eigenvalues.
        self.second_moment_dd.addmm_(shifted_nd.T, shifted_nd)

    def decompose(self, moments: Moments, *, center: bool) -> tuple[Tensor, Tensor]:
        """Return all eigenvectors of the scatter matrix in columns (d, d) and its eigenvalues (d,), descending."""
        scatter_dd = solver_copy(self.second_moment_dd)
        if center:
            offset_d = moments.offset_d.to(scatter_dd)
            scatter_dd -= moments.n_rows * torch.outer(offset_d, offset_d)
        values_d, vectors_dd = torch.linalg.eigh(scatter_dd)
        return vectors_dd.flip(1), values_d.flip(0).clamp_min(0.0)

    def merged(self, other: ExactState, mine: Moments, theirs: Moments, *, center: bool) -> ExactState:
        """Return the state of both sets of rows, about the shift of `mine`."""
        move_d = (theirs.shift_d - mine.shift_d).to(self.second_moment_dd)
        cross_dd = torch.outer(theirs.sum_d.to(move_d), move_d)
        moved_dd = other.second_moment_dd + cross_dd + cross_dd.T + theirs.n_rows * torch.outer(move_d, move_d)
        return ExactState(self.second_moment_dd + moved_dd)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors."""
        return {"second_moment": self.second_moment_dd}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], moments: Moments, *, center: bool) -> ExactState:
        """Return the state that `tensors` describes."""
        return cls(tensors["second_moment"])
