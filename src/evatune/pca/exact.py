"""Exact streaming PCA: accumulate the second moment S = Σ z zᵀ, (d, d), of the shifted rows z = x - shift.

Shapes: n rows, d features, k components, l columns.

Batch order, batch size and rank do not matter to the result, beyond rounding. One matrix product of O(n d²) a batch;
the leading eigenpairs come by subspace iteration from those that were found last. Right for inputs of moderate width,
and the oracle of the other backends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.pca.eigen import leading_eigenpairs
from evatune.pca.moments import Moments
from evatune.pca.products import accumulate_gram, energies_along, gram_norm, symmetric
from evatune.pca.subspace import solver_copy

HALF_PRECISION_NOISE = 0.03
"""How much of the mean small eigenvalue the rounding of one batch's product may be (`_review`)."""


class ExactState:
    """The second moment of the shifted rows, of which only strips up to the diagonal are filled.

    `missed` is the variance, not divided by the rows, that the leading components lack because the state began as a
    sketch.
    """

    def __init__(
        self,
        second_moment_dd: Tensor,
        *,
        n_rows_reviewed: int = 0,
        needs_full_precision: bool = True,
        missed: float = 0.0,
    ) -> None:
        self.second_moment_dd = second_moment_dd
        self.n_rows_reviewed = n_rows_reviewed
        self.needs_full_precision = needs_full_precision
        self.missed = missed
        self._near_dl: Tensor | None = None

    @classmethod
    def start(cls, first_nd: Tensor) -> ExactState:
        """Return the empty state for rows like these, (n, d)."""
        n_features = first_nd.shape[1]
        return cls(first_nd.new_zeros(n_features, n_features))

    @classmethod
    def of_eigenpairs(
        cls, vectors_dp: Tensor, values_p: Tensor, moments: Moments, *, center: bool, missed: float
    ) -> ExactState:
        """Return the state of rows whose scatter matrix has eigenvectors in columns (d, p) with eigenvalues (p,)."""
        vectors_dp, values_p = vectors_dp.to(moments.shift_d), values_p.to(moments.shift_d)
        second_moment_dd = (vectors_dp * values_p) @ vectors_dp.T
        if center:
            offset_d = moments.offset_d.to(second_moment_dd)
            second_moment_dd += moments.n_rows * torch.outer(offset_d, offset_d)
        state = cls(second_moment_dd, missed=missed)
        state._review(moments)
        return state

    def update(self, shifted_nd: Tensor, moments: Moments, *, center: bool, product_dtype: torch.dtype) -> ExactState:
        """Add shifted rows, (n, d), and return this state; `moments` include them already."""
        if self.n_rows_reviewed == 0 and product_dtype != shifted_nd.dtype:  # may they be in half precision?
            accumulate_gram(self.second_moment_dd, shifted_nd.to(product_dtype))
            self._review(moments)
            if not self.needs_full_precision:
                return self
            self.second_moment_dd.zero_()
        dtype = shifted_nd.dtype if self.needs_full_precision else product_dtype
        accumulate_gram(self.second_moment_dd, shifted_nd.to(dtype))
        if moments.n_rows >= 2 * self.n_rows_reviewed:
            self._review(moments)
        return self

    def _review(self, moments: Moments) -> None:
        """Decide whether products may be in bfloat16 until the rows have doubled.

        Each entry of such a product is rounded by a relative 2⁻⁹, so the error of a batch like all so far is a random
        matrix of norm 2 · 2⁻⁹ ‖S‖ / √(3 d) (Frobenius norm of S). It must be small beside the eigenvalues that matter,
        of which (trace S - ‖S‖) / d, the mean of the small ones, is a lower bound. It is not where a few massive
        activations own the variance.
        """
        norm, n_features = gram_norm(self.second_moment_dd), len(self.second_moment_dd)
        noise = 2 * 2.0**-9 * norm / (3 * n_features) ** 0.5
        small = (self.second_moment_dd.diagonal().sum() - norm) / n_features
        self.needs_full_precision = bool(noise > HALF_PRECISION_NOISE * small)
        self.n_rows_reviewed = moments.n_rows

    def decompose(self, moments: Moments, *, center: bool, n_pairs: int, rough: bool = False) -> tuple[Tensor, Tensor]:
        """Return at least `n_pairs` eigenvectors of the scatter matrix in columns (d, p) and its eigenvalues (p,).

        Args:
            moments: of the same rows.
            center: take the scatter about the mean.
            n_pairs: how many are wanted.
            rough: take one round from the eigenvectors that were found last, whatever the residual.
        """
        scatter_dd = symmetric(self.second_moment_dd)
        if center:
            offset_d = moments.offset_d.to(scatter_dd)
            scatter_dd.addr_(offset_d, offset_d, alpha=-moments.n_rows)
        tolerance = 1e-5 if scatter_dd.dtype == torch.float32 else 1e-16
        if self.needs_full_precision:  # large eigenvalues would drown small ones in the rounding of float32
            scatter_dd = solver_copy(scatter_dd)
        pairs = leading_eigenpairs(
            scatter_dd, n_pairs, tolerance=tolerance, near_dl=self._near_dl, n_rounds=1 if rough else None
        )
        self._near_dl = pairs[0].to(self.second_moment_dd)
        return pairs

    def scatter_along(self, directions_kd: Tensor, moments: Moments, *, center: bool) -> Tensor:
        """Return vᵀ C v for every row v of `directions_kd`, (k,), with the scatter matrix C."""
        directions_kd = directions_kd.to(self.second_moment_dd)
        energies_k = energies_along(self.second_moment_dd, directions_kd)
        if center:
            energies_k -= moments.n_rows * (directions_kd @ moments.offset_d.to(directions_kd)).square()
        return energies_k

    def merged(self, other: ExactState, mine: Moments, theirs: Moments, *, center: bool) -> ExactState:
        """Return the state of both sets of rows, about the shift of `mine`."""
        move_d = (theirs.shift_d - mine.shift_d).to(self.second_moment_dd)
        cross_dd = torch.outer(theirs.sum_d.to(move_d), move_d)
        moved_dd = other.second_moment_dd + cross_dd + cross_dd.T + theirs.n_rows * torch.outer(move_d, move_d)
        return ExactState(
            self.second_moment_dd + moved_dd,
            n_rows_reviewed=self.n_rows_reviewed + other.n_rows_reviewed,
            needs_full_precision=self.needs_full_precision or other.needs_full_precision,
            missed=self.missed + other.missed,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors."""
        review = torch.tensor([self.n_rows_reviewed, int(self.needs_full_precision)])
        missed = torch.tensor(self.missed, dtype=torch.float32)
        return {"second_moment": self.second_moment_dd, "review": review, "missed": missed}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ExactState:
        """Return the state that `tensors` describes."""
        n_rows_reviewed, full = tensors["review"].tolist()
        return cls(
            tensors["second_moment"],
            n_rows_reviewed=n_rows_reviewed,
            needs_full_precision=bool(full),
            missed=float(tensors["missed"]),
        )
