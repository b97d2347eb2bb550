"""Sketched streaming PCA: a Nyström sketch Y = S Q, (d, l), whose test matrix Q follows the data.

Shapes: n rows, d features, k components, l >= k sketch columns, s probes, p eigenpairs.

S = Σ z zᵀ is the second moment of the shifted rows; it is never formed. A batch costs the two thin products
P = Z Q and Y += Zᵀ P, O(n d l). Whenever the rows since the last refresh are as many as the rows before it, S is
approximated from the sketch by the Nyström formula Y (QᵀY)⁺ Yᵀ, its l leading eigenvectors become the new Q, and Y
restarts from what that approximation knows of the past. So the test matrix takes one step of subspace iteration at
each doubling of the data. A refresh costs five products of O(d l²); their number grows with the logarithm of the data.

A fixed random Q would collapse on slowly decaying spectra; the leading eigenvectors of the rows so far do not. They
still lose the part of past rows that lies outside of the sketch. Probes estimate this loss: a few random columns Ω
never change and take no part in the approximation, but W = S Ω is accumulated over all rows. For an eigenpair (v, λ) of
the approximation, vᵀW - λ vᵀΩ has mean square ‖S v - λ v‖², the squared residual of the pair in the true matrix. If the
components seem to miss more than the tolerance, the sketch gets wider, or the exact second moment replaces it.

References: Gittens and Mahoney (2013) and Tropp, Yurtsever, Udell and Cevher (2017) for the Nyström approximation with
a shift; Levy and Lindenbaum (2000) for sequential bases; Tropp, Yurtsever, Udell and Cevher (2019) for estimates of
errors from random probes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.pca.backend import WORKING_COPIES, Pairs, State, Wanted, between_means, merge_eigenpairs
from evatune.pca.cost import DOUBLE, FLOAT, HALF, Cost, components_bytes, moments_bytes
from evatune.pca.eigen import missed_variance
from evatune.pca.exact import ExactState
from evatune.pca.moments import Moments
from evatune.pca.nystrom import nystrom_eigenpairs
from evatune.pca.parking import Parkable
from evatune.pca.products import BFLOAT16_ROUNDING, accumulate_product
from evatune.pca.subspace import complete_basis, solver_copy, told_apart
from evatune.pca.together import Host, Steps, alone
from evatune.pca.widths import N_PROBES, is_narrow, sketch_width, wider_sketch, widest_sketch

FIRST_BATCH_ITERATIONS = 2
"""Subspace iterations on the first batch, which starts from a random test matrix."""

RESIDUAL_NOISE = 1e-2
"""Largest residual, relative to the k-th eigenvalue, that rounding to bfloat16 may cause by estimate (`_is_massive`).

The missed variance is about its square: measured on 4,096 features with variances 1/i, 3e-7 (`benchmarks/scaling.py`).
"""

MASSIVE_RATIO = 1e5
"""If the largest eigenvalue of a sketch exceeds its smallest by this factor, bfloat16 errors hide the smallest."""

HALF_MARGIN = 10
"""The first half of the components may miss only the tolerance divided by this. Chosen, not measured: with rho 2, a
target uses on average half of the components that are kept."""

SAFETY = 4
"""A sketch is widened as soon as it seems to miss more than the tolerance divided by this: what it has missed so far is
lost for good."""

SETTLED = 2
"""The tolerance of a sketch holds from this times k² rows on. With n rows before that, it is larger by the factor
SETTLED k² / n.

Neighbours among k eigenvalues differ by about a share 1/k, and n rows separate their eigenvectors if √n is well above
k. With fewer rows, a sketch misses variance mostly because axes turn with every batch, and this error falls as rows are
added. The first batch is an exception: all its rows are in memory, so a sketch misses variance only if it has too few
columns.
"""

PROBE_SEED = 0x9E3779B9
"""Seed of the probes, whatever the seed of the test matrix is."""


class SketchState(State):
    """Test matrix and probes [Q Ω], sketches [Y W] = S [Q Ω], and when they were refreshed.

    Args:
        wanted: what is asked for. Its tolerance holds for all components, and a tenth of it for the first half of them;
            with few rows both are larger (`SETTLED`).
        moments: count, mean and variance of the rows.
        columns_dm: test matrix and probes, (d, m) with m = l + s, in bfloat16: they were rounded to it (`_rounded`).
        sums_dm: their products with S, (d, m).
        n_rows_refreshed: how many rows there were at the last refresh.
        needs_full_precision: whether bfloat16 rounding errors would hide directions of small variance.
    """

    name = "sketch"
    turns_into: ClassVar[tuple[str, ...]] = ("exact",)

    def __init__(
        self,
        wanted: Wanted,
        moments: Moments,
        columns_dm: Tensor,
        sums_dm: Tensor,
        *,
        n_rows_refreshed: int = 0,
        needs_full_precision: bool = False,
    ) -> None:
        super().__init__(wanted, moments)
        self._columns = Parkable(columns_dm, changes=False)
        self._sums = Parkable(sums_dm, changes=True)
        self.n_rows_refreshed = n_rows_refreshed
        self.needs_full_precision = needs_full_precision
        self._known: Pairs | None = None  # eigenpairs of the rows so far
        self._first: tuple[Tensor, torch.dtype] | None = None  # rows of the first batch, until the state settles

    @classmethod
    def start(cls, wanted: Wanted, moments: Moments) -> Self:
        """Return the state of no rows, with a random test matrix."""
        like_d = moments.shift_d
        width = sketch_width(min(wanted.n_components, len(like_d)), len(like_d))
        random_dm = _random_columns(len(like_d), width + N_PROBES, seed=wanted.seed)
        columns_dm = random_dm.to(like_d.device, copy=True, non_blocking=True)
        return cls(wanted, moments, columns_dm, torch.zeros_like(columns_dm, dtype=like_d.dtype))

    @property
    def columns_dm(self) -> Tensor:
        """Test matrix and probes, (d, m), on their device."""
        return self._columns.get()

    @property
    def sums_dm(self) -> Tensor:
        """Products of S with them, (d, m), on their device."""
        return self._sums.get()

    @property
    def width(self) -> int:
        """How many columns the sketch has beside the probes, l."""
        return self._columns.shape[1] - N_PROBES

    def update(self, shifted_nd: Tensor, *, product_dtype: torch.dtype) -> None:
        """Add shifted rows, (n, d); `moments` include them already. The test matrix is made from the first ones."""
        is_first = self.moments.n_rows == len(shifted_nd)
        if is_first:
            test_dl = self.columns_dm[:, : self.width].to(shifted_nd)
            for _ in range(FIRST_BATCH_ITERATIONS):
                test_dl = _rounded(told_apart(shifted_nd.T @ (shifted_nd @ test_dl)))
            self.columns_dm[:, : self.width] = test_dl
        self._known = None
        self._first = (shifted_nd, product_dtype) if is_first and self._may_turn_exact else None
        rows_nd = shifted_nd if is_first or self.needs_full_precision else shifted_nd.to(product_dtype)
        projected_nm = rows_nd @ self.columns_dm.to(rows_nd.dtype)
        sums_dm = self.sums_dm
        accumulate_product(sums_dm, rows_nd.T, projected_nm)
        self._sums.put(sums_dm)
        self._leave()

    @property
    def _may_turn_exact(self) -> bool:
        return self.wanted.tolerance is not None and is_narrow(self.n_features)

    @property
    def is_due(self) -> bool:
        """Whether the rows have doubled since the last refresh."""
        return self.moments.n_rows >= 2 * self.n_rows_refreshed

    def settle(self) -> Steps[State]:
        """Refresh, and return the state to continue with.

        It is this state, perhaps wider. If the widest sketch is not good enough and the rows are narrow, it is an exact
        one.
        """
        pairs = yield from self._eigenpairs()
        first, self._first = self._first, None
        width = self.width
        asked = self._excess(*pairs)
        excess, is_massive = yield Host(torch.stack([asked, self._is_massive(pairs[1]).to(asked)]))
        if excess > 1:
            if width < widest_sketch(self.n_components, self.n_features):
                width = wider_sketch(width, excess=excess, n_components=self.n_components, n_features=self.n_features)
            elif self._may_turn_exact:
                if first is None:
                    return (yield from self._exactly())
                state = ExactState.start(self.wanted, self.moments)  # nothing is lost: all rows are in memory
                state.update(first[0], product_dtype=first[1])
                return (yield from state.settle()) if state.is_due else state
        self._restart(pairs, width=width, needs_full_precision=bool(is_massive))
        return self

    def refresh(self) -> Steps[None]:
        """Make the leading eigenvectors of the rows so far the test matrix."""
        if not self._is_refreshed:
            pairs = yield from self._eigenpairs()
            (is_massive,) = yield Host(self._is_massive(pairs[1]))
            self._restart(pairs, width=self.width, needs_full_precision=bool(is_massive))

    @property
    def _is_refreshed(self) -> bool:
        return self.n_rows_refreshed == self.moments.n_rows

    def exactly(self) -> State:
        """Return what the sketch knows as an exact state, which remembers what the sketch misses."""
        return alone(self._exactly())

    def _exactly(self) -> Steps[State]:
        pairs = yield from self._eigenpairs()
        missed = yield from self.missed()
        return (yield from ExactState.of_eigenpairs(self.wanted, self.moments, pairs, missed=missed))

    def missed(self) -> Steps[float]:
        """Estimate from the probes how much variance the components miss, not divided by the number of rows."""
        pairs = yield from self._eigenpairs()
        (missed,) = yield Host(self._missed(*pairs).sum())
        return missed

    def _excess(self, vectors_dp: Tensor, values_p: Tensor) -> Tensor:
        """Return the estimate of what the sketch misses, divided by what it may miss, a scalar tensor."""
        if self.wanted.tolerance is None or not len(values_p):
            return vectors_dp.new_zeros(())
        missed_k = self._missed(vectors_dp, values_p)
        n_half = (len(missed_k) + 1) // 2
        share = missed_k.sum() / values_p[: len(missed_k)].sum()
        share_of_half = missed_k[:n_half].sum() / values_p[:n_half].sum()
        allowed = self.wanted.tolerance / SAFETY
        if self.n_rows_refreshed:
            allowed *= max(1.0, SETTLED * self.n_components**2 / self.moments.n_rows)
        return torch.maximum(share, HALF_MARGIN * share_of_half) / allowed

    def _missed(self, vectors_dp: Tensor, values_p: Tensor) -> Tensor:
        """Estimate what each of the first k components misses, (k,), in the units of the eigenvalues.

        By second-order perturbation, an eigenpair (v, λ) with residual ρ misses ρ² / (λ - μ) to directions of smaller
        eigenvalues μ, and at most ρ. Outside of the sketch, μ is at most about its last eigenvalue.
        """
        if not len(values_p):
            return values_p
        components_dk, values_k = (solver_copy(pairs[..., : self.n_components]) for pairs in (vectors_dp, values_p))
        probes_ds = solver_copy(self.columns_dm[:, self.width :])
        images_ds = solver_copy(self._scatter_of(slice(self.width, None)))
        residuals_ks = components_dk.T @ images_ds - values_k[:, None] * (components_dk.T @ probes_ds)
        residuals_k = residuals_ks.square().mean(dim=1).sqrt()
        return missed_variance(residuals_k, values_k, solver_copy(values_p[-1]))

    def _restart(self, pairs: Pairs, *, width: int, needs_full_precision: bool) -> None:
        """Continue with `width` columns from known eigenpairs of the scatter matrix."""
        vectors_dp, values_p = pairs
        moments = self.moments
        # Saving rounds in the same way, so that a loaded state continues with exactly these numbers.
        vectors_dp = vectors_dp[:, :width].to(self.sums_dm).contiguous()
        values_p = values_p[:width].to(self.sums_dm)
        test_dl = vectors_dp
        if len(values_p) < width:
            test_dl = complete_basis(vectors_dp, width, seed=self.wanted.seed + moments.n_rows)
        test_dl = _rounded(test_dl)
        # The sketch as it would be if S were V Λ Vᵀ (+ n o oᵀ about the shift) and Q had always been this test matrix.
        sketch_dl = vectors_dp @ (values_p[:, None] * (vectors_dp.T @ test_dl))
        if self.center:
            offset_d = moments.offset_d.to(test_dl)
            sketch_dl.addr_(offset_d, offset_d @ test_dl, alpha=moments.n_rows)
        old_width = self.width
        self._columns.put(torch.cat([test_dl.to(self.columns_dm), self.columns_dm[:, old_width:]], dim=1))
        self._sums.put(torch.cat([sketch_dl, self.sums_dm[:, old_width:]], dim=1))
        self.n_rows_refreshed = moments.n_rows
        self._known = vectors_dp, values_p
        self.needs_full_precision = needs_full_precision

    def _is_massive(self, values_p: Tensor) -> Tensor:
        """Tell, by a scalar tensor, whether a few directions are so large that bfloat16 errors would hide the others.

        Each entry of a probe's product is rounded by a relative 2⁻⁹, and is of the order of λ₁ / √d. If the rows so far
        span fewer directions than there are columns, the other columns would see nothing but these errors.
        """
        if len(values_p) < self.width:
            return self.sums_dm.new_ones(())
        smallest = values_p[min(self.n_components, len(values_p)) - 1]
        noise = BFLOAT16_ROUNDING * values_p[0] / self.n_features**0.5
        return ((noise > RESIDUAL_NOISE * smallest) | (values_p[0] > MASSIVE_RATIO * values_p[-1])).to(values_p)

    def _scatter_of(self, part: slice) -> Tensor:
        """Return the products of the scatter matrix with some of the columns, (d, at most m)."""
        sums_dm = self.sums_dm[:, part]
        if not self.center:
            return sums_dm
        offset_d = self.moments.offset_d.to(sums_dm)
        return sums_dm.addr(offset_d, offset_d @ self.columns_dm[:, part].to(sums_dm), alpha=-self.moments.n_rows)

    def eigenpairs(self, n_pairs: int, *, rough: bool = False) -> Steps[Pairs]:
        """Return approximate eigenpairs of the scatter matrix in float64, at most one for each column.

        The first k are orthonormal up to the rounding of float64.
        """
        found = yield from self._eigenpairs()
        vectors_dp, values_p = (solver_copy(tensor) for tensor in found)
        leading_dk = vectors_dp[:, : self.n_components]  # orthonormal up to rounding in float32; corrected next
        eye_kk = torch.eye(leading_dk.shape[1], dtype=leading_dk.dtype, device=leading_dk.device)
        leading_dk -= leading_dk @ (leading_dk.T @ leading_dk - eye_kk) / 2
        return vectors_dp, values_p

    def _eigenpairs(self) -> Steps[Pairs]:
        """Return the eigenpairs in the dtype of the sums; they are stored until rows are added."""
        if self._known is None:
            sketch_dl = self._scatter_of(slice(self.width))
            test_dl = self.columns_dm[:, : self.width].to(sketch_dl)
            self._known = yield from nystrom_eigenpairs(test_dl, sketch_dl)
        return self._known

    def merged(self, other: Self) -> Self:
        """Return the state of both sets of rows, from the eigenpairs of both states. Cost O(d l²)."""
        moments = self.moments.merged(other.moments)
        images_ds = solver_copy(self._scatter_of(slice(self.width, None)))
        images_ds += solver_copy(other._scatter_of(slice(other.width, None)))
        probes_ds = solver_copy(self.columns_dm[:, self.width :])
        if self.center:
            weight, difference_d = between_means(self.moments, other.moments)
            difference_d, offset_d = difference_d.to(images_ds), moments.offset_d.to(images_ds)
            images_ds += weight * torch.outer(difference_d, difference_d @ probes_ds)
            images_ds += moments.n_rows * torch.outer(offset_d, offset_d @ probes_ds)
        wider = self if self.width >= other.width else other
        sums_dm = torch.cat([wider.sums_dm[:, : wider.width].to(self.sums_dm), images_ds.to(self.sums_dm)], dim=1)
        state = type(self)(self.wanted, moments, wider.columns_dm, sums_dm)
        vectors_dp, values_p = merge_eigenpairs(self, other)
        is_massive = bool(state._is_massive(values_p[: wider.width].to(sums_dm)))
        state._restart((vectors_dp, values_p), width=wider.width, needs_full_precision=is_massive)
        return state

    def condensed(self) -> State:
        """Return this state, which is thin."""
        return self

    def release(self) -> None:
        """Forget the eigenpairs of the rows so far."""
        self._known = None
        self._leave()

    def parkable(self) -> list[Parkable]:
        """Return the two matrices; rows change only one of them."""
        return [self._columns, self._sums]

    def _leave(self) -> None:
        self._columns.leave()
        self._sums.leave()

    @property
    def working_bytes(self) -> int:
        """About how many bytes of working memory a factorization needs: of copies in the dtype of the sums."""
        return WORKING_COPIES * 2 * self._sums.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors; right after a refresh, eigenpairs (d, l), (l,) replace Q and Y."""
        numbers = [self.wanted.seed, self.n_rows_refreshed, int(self.needs_full_precision), self.width]
        common = self.moments.tensors() | {"counters": torch.tensor(numbers)}
        if self._known is None or not self._is_refreshed:
            return common | {"columns": self.columns_dm, "sums": self.sums_dm}
        vectors_dp, values_p = self._known
        return common | {"vectors": vectors_dp, "values": values_p, "probed": self.sums_dm[:, self.width :]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], wanted: Wanted) -> Self:
        """Return the state that `tensors` describes; it continues with the seed of its beginning."""
        moments = Moments.from_tensors(tensors)
        seed, n_rows_refreshed, full, width = tensors["counters"].tolist()
        wanted = replace(wanted, seed=seed)
        if "vectors" not in tensors:
            return cls(
                wanted,
                moments,
                tensors["columns"].to(torch.bfloat16),  # nothing is lost
                tensors["sums"],
                n_rows_refreshed=n_rows_refreshed,
                needs_full_precision=bool(full),
            )
        probed_ds = tensors["probed"]
        columns_dm = _random_columns(len(probed_ds), width + N_PROBES, seed=seed).to(probed_ds.device, copy=True)
        sums_dm = torch.cat([probed_ds.new_zeros(len(probed_ds), width), probed_ds], dim=1)
        state = cls(wanted, moments, columns_dm, sums_dm)
        state._restart((tensors["vectors"], tensors["values"]), width=width, needs_full_precision=bool(full))
        return state

    @classmethod
    def cost(cls, n_components: int, n_features: int) -> Cost:
        """Return the cost of two thin matrices, which may get wider, or be replaced by one square matrix."""
        k, d = n_components, n_features
        width, widest = sketch_width(k, d), widest_sketch(k, d)
        initial_bytes, state_bytes = ((FLOAT + HALF) * d * (columns + N_PROBES) for columns in (width, widest))
        if width < d and is_narrow(d):
            state_bytes = max(state_bytes, FLOAT * d * d)
        return Cost(
            backend=cls.name,
            width=width,
            state_bytes=state_bytes + moments_bytes(d),
            initial_bytes=initial_bytes + moments_bytes(d),
            # The eigenvectors of the last refresh are kept until rows are added.
            cached_bytes=components_bytes(k, d) + FLOAT * d * widest + DOUBLE * widest,
        )


@functools.lru_cache(maxsize=8)
def _random_columns(n_features: int, n_columns: int, *, seed: int) -> Tensor:
    """Return Gaussian columns (d, m), on the CPU, which inputs of one width share: they must not be changed.

    The last are the probes, the same in all sketches so that these merge.
    """
    generator = torch.Generator().manual_seed(PROBE_SEED)
    probes_ds = torch.randn(n_features, N_PROBES, generator=generator, device="cpu")
    generator.manual_seed(seed)
    test_dl = torch.randn(n_features, n_columns - N_PROBES, generator=generator, device="cpu")
    return torch.cat([test_dl, probes_ds], dim=1).to(torch.bfloat16)


def _rounded(columns_dm: Tensor) -> Tensor:
    """Round columns to bfloat16, so that half-precision products use exactly the same columns as the formulas do.

    It also keeps columns out of the null space of the rows: rounding adds a part along the large directions, so that
    qᵀS q is far above the rounding errors. Without it the Nyström formula would divide rounding errors by each other.
    """
    return columns_dm.to(torch.bfloat16).to(columns_dm.dtype)
