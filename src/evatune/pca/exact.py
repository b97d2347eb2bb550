"""Exact streaming PCA: accumulate the second moment S = Σ z zᵀ, (d, d), of the shifted rows z = x - shift.

Shapes: n rows, d features, k components, l columns.

Batch order, batch size and rank do not change the result, beyond rounding. One matrix product of O(n d²) a batch;
the leading eigenpairs are found by subspace iteration that starts from the last ones. Right for inputs of moderate
width, and the reference in tests of the other backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.pca.backend import WORKING_COPIES, Pairs, State, Wanted
from evatune.pca.cost import FLOAT, Cost, components_bytes, moments_bytes
from evatune.pca.eigen import OVERSAMPLING, leading_eigenpairs
from evatune.pca.leading import LeadingState
from evatune.pca.moments import Moments
from evatune.pca.products import BFLOAT16_ROUNDING, accumulate_gram, energies_along, gram_norm, symmetric
from evatune.pca.subspace import solver_copy
from evatune.pca.together import Host, Steps, alone

BATCH_NOISE = 0.03
"""Largest allowed rounding error of one batch's bfloat16 product, as a share of the mean small eigenvalue (`_review`).

With this value, products in bfloat16 miss 2e-5 of the variance at most on spectra without massive directions
(`tests/pca/test_exact.py`).
"""

SPARE_PAIRS = 48
"""In place of a second moment, processes exchange the pairs of the k components and this many more (k more if k is
larger). It is half the number of spare columns of a sketch (`evatune.pca.widths.SPARE`): eigenvectors have converged,
the columns of a sketch have not."""

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-16}
"""Share of their eigenvalues that components may miss on average, by the dtype of the sums. With 1e-5 the components
of SmolLM2's inputs miss 1e-6 of the variance (`benchmarks/accuracy.py`); 1e-16 is the rounding of float64."""


class ExactState(State):
    """The second moment of the shifted rows, of which only strips up to the diagonal are filled (`accumulate_gram`).

    Args:
        wanted: what is asked for.
        moments: of the rows.
        second_moment_dd: S as `accumulate_gram` fills it, (d, d).
        n_rows_reviewed: how many rows there were at the last `_review`, which decides how precise products must be.
        needs_full_precision: the result of that review.
        missed: the variance, not divided by the number of rows, that the leading components miss because the state
            began as a sketch.
    """

    name = "exact"
    keeps_all: ClassVar[bool] = True

    def __init__(
        self,
        wanted: Wanted,
        moments: Moments,
        second_moment_dd: Tensor,
        *,
        n_rows_reviewed: int = 0,
        needs_full_precision: bool = True,
        missed: float = 0.0,
    ) -> None:
        super().__init__(wanted, moments)
        self.second_moment_dd = second_moment_dd
        self.n_rows_reviewed = n_rows_reviewed
        self.needs_full_precision = needs_full_precision
        self._missed = missed
        self._near_dl: Tensor | None = None  # what the last rough snapshot found

    @classmethod
    def start(cls, wanted: Wanted, moments: Moments) -> Self:
        """Return the state of no rows: zeros."""
        n_features = len(moments.shift_d)
        return cls(wanted, moments, moments.shift_d.new_zeros(n_features, n_features))

    @classmethod
    def of_eigenpairs(cls, wanted: Wanted, moments: Moments, pairs: Pairs, *, missed: float) -> Steps[Self]:
        """Return the state of rows whose scatter matrix has these eigenpairs."""
        vectors_dp, values_p = (tensor.to(moments.shift_d) for tensor in pairs)
        second_moment_dd = (vectors_dp * values_p) @ vectors_dp.T
        if wanted.center:
            offset_d = moments.offset_d.to(second_moment_dd)
            second_moment_dd += moments.n_rows * torch.outer(offset_d, offset_d)
        state = cls(wanted, moments, second_moment_dd, missed=missed)
        yield from state._review()
        return state

    def update(self, shifted_nd: Tensor, *, product_dtype: torch.dtype) -> None:
        """Add shifted rows, (n, d); `moments` include them already.

        On the CPU, the first rows themselves decide whether they may be multiplied in half precision. On an accelerator
        that question would stall the device, so there the first rows are multiplied in full precision.
        """
        is_first = self.n_rows_reviewed == 0
        if is_first and product_dtype != shifted_nd.dtype and shifted_nd.device.type == "cpu":
            accumulate_gram(self.second_moment_dd, shifted_nd.to(product_dtype))
            alone(self._review())
            if not self.needs_full_precision:
                return
            self.second_moment_dd.zero_()
        dtype = shifted_nd.dtype if self.needs_full_precision else product_dtype
        accumulate_gram(self.second_moment_dd, shifted_nd.to(dtype))

    @property
    def is_due(self) -> bool:
        """Whether the number of rows has doubled since the last review."""
        return self.moments.n_rows >= 2 * self.n_rows_reviewed

    def settle(self) -> Steps[State]:
        """Decide again how precise products must be, and return this state."""
        yield from self._review()
        return self

    def _review(self) -> Steps[None]:
        """Decide whether products may be in bfloat16 until the number of rows has doubled.

        Each entry of such a product is rounded by a relative 2⁻⁹, so the error of a batch like all so far is a random
        matrix of norm 2 · 2⁻⁹ ‖S‖ / √(3 d) (Frobenius norm of S). It must be small beside the eigenvalues that matter;
        (trace S - ‖S‖) / d, the mean of the small ones, is a lower bound of these. It is not small where a few massive
        activations hold most of the variance.
        """
        norm = gram_norm(self.second_moment_dd)
        noise = 2 * BFLOAT16_ROUNDING * norm / (3 * self.n_features) ** 0.5
        small = (self.second_moment_dd.diagonal().sum() - norm) / self.n_features
        (is_loud,) = yield Host(noise > BATCH_NOISE * small)
        self.needs_full_precision = bool(is_loud)
        self.n_rows_reviewed = self.moments.n_rows

    def refresh(self) -> Steps[None]:
        """Do nothing: there is no smaller form."""
        yield from ()

    def eigenpairs(self, n_pairs: int, *, rough: bool = False) -> Steps[Pairs]:
        """Return at least `n_pairs` eigenpairs of the scatter matrix, or all if it has fewer.

        A rough call takes one round of iteration from the eigenvectors that the last rough call found, whatever the
        residual, and stores its own eigenvectors; the next call starts from them, rough or not.
        """
        scatter_dd = symmetric(self.second_moment_dd)
        if self.center:
            offset_d = self.moments.offset_d.to(scatter_dd)
            scatter_dd.addr_(offset_d, offset_d, alpha=-self.moments.n_rows)
        tolerance = TOLERANCES[scatter_dd.dtype]
        if self.needs_full_precision:  # float32 rounding errors of large eigenvalues would hide small ones
            scatter_dd = solver_copy(scatter_dd)
        pairs = yield from leading_eigenpairs(
            scatter_dd, n_pairs, tolerance=tolerance, near_dl=self._near_dl, n_rounds=1 if rough else None
        )
        if rough:
            vectors_dl = pairs[0][:, : n_pairs + OVERSAMPLING]  # of a full decomposition, no more than these are kept
            self._near_dl = vectors_dl.to(self.second_moment_dd, copy=True)
        return pairs

    def missed(self) -> Steps[float]:
        """Return zero, or what the sketch had missed if the state began as one."""
        yield from ()
        return self._missed

    def scatter_along(self, directions_kd: Tensor) -> Tensor:
        """Return vᵀ C v for every row v of `directions_kd`, (k,), of all rows. Cost O(d² k)."""
        directions_kd = directions_kd.to(self.second_moment_dd)
        energies_k = energies_along(self.second_moment_dd, directions_kd)
        if self.center:
            energies_k -= self.moments.n_rows * (directions_kd @ self.moments.offset_d.to(directions_kd)).square()
        return energies_k

    def merged(self, other: Self) -> Self:
        """Return the state of both sets of rows, about the shift of this one; nothing is lost. Cost O(d²)."""
        theirs = other.moments
        move_d = (theirs.shift_d - self.moments.shift_d).to(self.second_moment_dd)
        cross_dd = torch.outer(theirs.sum_d.to(move_d), move_d)
        moved_dd = other.second_moment_dd + cross_dd + cross_dd.T + theirs.n_rows * torch.outer(move_d, move_d)
        return type(self)(
            self.wanted,
            self.moments.merged(theirs),
            self.second_moment_dd + moved_dd,
            n_rows_reviewed=self.n_rows_reviewed + other.n_rows_reviewed,
            needs_full_precision=self.needs_full_precision or other.needs_full_precision,
            missed=self._missed + other._missed,
        )

    def exactly(self) -> State:
        """Return this state."""
        return self

    def condensed(self) -> State:
        """Return the leading eigenpairs if they take much less memory than the matrix, else this state."""
        n_pairs = max(2 * self.n_components, self.n_components + SPARE_PAIRS)
        if 2 * n_pairs >= self.n_features:
            return self
        vectors_dp, values_p = alone(self.eigenpairs(n_pairs))
        components_pd, values_p = (
            tensor[:n_pairs].to(self.second_moment_dd) for tensor in (vectors_dp.T, values_p.sqrt())
        )
        return LeadingState.of(self.wanted, self.moments, components_pd, values_p)

    @property
    def working_bytes(self) -> int:
        """About how many bytes of working memory a factorization needs."""
        return WORKING_COPIES * self.second_moment_dd.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors."""
        return self.moments.tensors() | {
            "second_moment": self.second_moment_dd,
            "review": torch.tensor([self.n_rows_reviewed, int(self.needs_full_precision)]),
            "missed": torch.tensor(self._missed, dtype=torch.float32),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], wanted: Wanted) -> Self:
        """Return the state that `tensors` describes."""
        n_rows_reviewed, full = tensors["review"].tolist()
        return cls(
            wanted,
            Moments.from_tensors(tensors),
            tensors["second_moment"],
            n_rows_reviewed=n_rows_reviewed,
            needs_full_precision=bool(full),
            missed=float(tensors["missed"]),
        )

    @classmethod
    def cost(cls, n_components: int, n_features: int) -> Cost:
        """Return the cost of the matrix and of the columns from which the next snapshot starts."""
        k, d = n_components, n_features
        n_bytes = FLOAT * d * d + moments_bytes(d)
        return Cost(
            backend=cls.name,
            state_bytes=n_bytes,
            initial_bytes=n_bytes,
            cached_bytes=components_bytes(k, d) + FLOAT * d * min(k + OVERSAMPLING, d),
        )
