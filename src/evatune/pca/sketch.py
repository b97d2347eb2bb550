"""Sketched streaming PCA: a Nyström sketch Y = S Q, (d, l), whose test matrix Q follows the data.

Shapes: n rows, d features, k components, l >= k sketch columns, s probes, p eigenpairs.

S = Σ z zᵀ is the second moment of the shifted rows; it is never formed. A batch costs the two thin products
P = Z Q and Y += Zᵀ P, O(n d l). Whenever the rows since the last refresh are as many as the rows before it, S is
approximated from the sketch by the Nyström formula Y (QᵀY)⁺ Yᵀ, its l leading eigenvectors become the new Q, and Y
restarts from what that approximation knows of the past. So the test matrix takes one step of subspace iteration at
each doubling of the data. A refresh costs five products of O(d l²); their number grows with the logarithm of the data.

Columns are rounded to bfloat16, so that half-precision products use exactly the same columns as the formulas do. It
also keeps columns out of the null space of the rows: rounding adds a part along the large directions, so that qᵀS q is
far above the rounding errors. Without it the Nyström formula would divide rounding errors by each other.

A fixed random Q would collapse on slowly decaying spectra; the leading eigenvectors of the rows so far do not. They
still lose the part of past rows that lies outside of the sketch. A few more columns, the probes, estimate this loss
(`evatune.pca.probes`). If the components seem to miss more than the tolerance, the sketch gets wider, or the exact
second moment replaces it.

References: Gittens and Mahoney (2013) and Tropp, Yurtsever, Udell and Cevher (2017) for the Nyström approximation with
a shift; Levy and Lindenbaum (2000) for sequential bases.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.pca import probes
from evatune.pca.backend import WORKING_COPIES, Pairs, State, Wanted, between_means, merge_eigenpairs
from evatune.pca.cost import DOUBLE, FLOAT, HALF, Cost, components_bytes, moments_bytes
from evatune.pca.exact import ExactState
from evatune.pca.moments import Moments
from evatune.pca.nystrom import nystrom_eigenpairs
from evatune.pca.parking import Parkable
from evatune.pca.products import accumulate_product, rounded
from evatune.pca.subspace import complete_basis, own, plus_outer, row_times, solver_copy, told_apart
from evatune.pca.together import Host, Steps, alone, batched
from evatune.pca.widths import N_PROBES, is_narrow, sketch_width, wider_sketch, widest_sketch

FIRST_BATCH_ITERATIONS = 2
"""Subspace iterations on the first batch, which starts from a random test matrix."""

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
        columns_dm: test matrix and probes, (d, m) with m = l + s, in bfloat16, which they were rounded to.
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
        columns_dm = _new_columns(len(like_d), width + N_PROBES, seed=wanted.seed, device=like_d.device)
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
                test_dl = rounded(told_apart(shifted_nd.T @ (shifted_nd @ test_dl)))
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
        share, is_massive = yield from self._judged(*pairs, is_asked=self.wanted.tolerance is not None)
        excess = share / self._allowed
        if excess > 1:
            if width < widest_sketch(self.n_components, self.n_features):
                width = wider_sketch(width, excess=excess, n_components=self.n_components, n_features=self.n_features)
            elif self._may_turn_exact:
                if first is None:
                    return (yield from self._exactly())
                state = ExactState.start(self.wanted, self.moments)  # nothing is lost: all rows are in memory
                state.update(first[0], product_dtype=first[1])
                return (yield from state.settle()) if state.is_due else state
        yield from self._restart(pairs, width=width, needs_full_precision=is_massive)
        return self

    def refresh(self) -> Steps[None]:
        """Make the leading eigenvectors of the rows so far the test matrix."""
        if not self._is_refreshed:
            pairs = yield from self._eigenpairs()
            _, is_massive = yield from self._judged(*pairs, is_asked=False)
            yield from self._restart(pairs, width=self.width, needs_full_precision=is_massive)

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
        missed_k = yield from self._missed(*pairs)
        (missed,) = yield Host(missed_k.sum())
        return missed

    @property
    def _allowed(self) -> float:
        """What the components may miss before the sketch gets wider, as a share of what they capture."""
        if self.wanted.tolerance is None:
            return math.inf
        few = SETTLED * self.n_components**2 / self.moments.n_rows if self.n_rows_refreshed else 0.0
        return self.wanted.tolerance / SAFETY * max(1.0, few)

    def _judged(self, vectors_dp: Tensor, values_p: Tensor, *, is_asked: bool) -> Steps[tuple[float, bool]]:
        """Return the share that the components seem to miss, zero if nobody asks, and `needs_full_precision`."""
        missed = [(yield from self._missed(vectors_dp, values_p))] if is_asked and len(values_p) else []
        (found,) = yield batched(probes.judged, values_p, *missed, **self._sizes)
        share, is_massive = yield Host(found)
        return share, bool(is_massive)

    @property
    def _sizes(self) -> dict[str, int]:
        return {"n_components": self.n_components, "n_features": self.n_features, "width": self.width}

    def _missed(self, vectors_dp: Tensor, values_p: Tensor) -> Steps[Tensor]:
        """Estimate what each of the first k components misses, (k,), in the units of the eigenvalues."""
        if not len(values_p):
            return values_p
        k = self.n_components
        probes_ds, images_ds = yield from self._about_mean(slice(self.width, None))
        (missed_k,) = yield batched(
            probes.missed_by, vectors_dp[:, :k], values_p[:k], values_p[-1:], probes_ds, images_ds
        )
        return missed_k  # type: ignore[no-any-return]

    def _restart(self, pairs: Pairs, *, width: int, needs_full_precision: bool) -> Steps[None]:
        """Continue with `width` columns from known eigenpairs of the scatter matrix."""
        # Saving rounds in the same way, so that a loaded state continues with exactly these numbers.
        vectors_dp = pairs[0][:, :width].to(self.sums_dm).contiguous()
        values_p = pairs[1][:width].to(self.sums_dm)
        test_dl = vectors_dp
        if len(values_p) < width:
            test_dl = complete_basis(vectors_dp, width, seed=self.wanted.seed + self.moments.n_rows)
        past = (self.columns_dm[:, self.width :], self.sums_dm[:, self.width :], self.moments.sum_d)
        n_rows = self.moments.n_rows
        columns_dm, sums_dm = yield batched(
            _restarted, vectors_dp, values_p, test_dl, *past, n_rows=n_rows if self.center else 0
        )
        self._columns.put(own(columns_dm))
        self._sums.put(own(sums_dm))
        self.n_rows_refreshed = n_rows
        self._known = vectors_dp, values_p
        self.needs_full_precision = needs_full_precision

    def _about_mean(self, part: slice) -> Steps[tuple[Tensor, Tensor]]:
        """Return some of the columns, and their products with the scatter matrix, each (d, at most m)."""
        columns_dm, sums_dm = self.columns_dm[:, part], self.sums_dm[:, part]
        if not self.center:
            return columns_dm.to(sums_dm), sums_dm
        of_rows = (self.moments.sum_d, columns_dm, sums_dm)
        return (yield batched(_about_mean, *of_rows, n_rows=self.moments.n_rows))

    def eigenpairs(self, n_pairs: int, *, rough: bool = False) -> Steps[Pairs]:
        """Return approximate eigenpairs of the scatter matrix in float64, at most one for each column.

        The first k are orthonormal up to the rounding of float64.
        """
        found = yield from self._eigenpairs()
        return (yield batched(_straightened, *found, n_components=self.n_components))

    def _eigenpairs(self) -> Steps[Pairs]:
        """Return the eigenpairs in the dtype of the sums; they are stored until rows are added."""
        if self._known is None:
            test_dl, sketch_dl = yield from self._about_mean(slice(self.width))
            self._known = yield from nystrom_eigenpairs(test_dl, sketch_dl)
        return self._known

    def merged(self, other: Self) -> Self:
        """Return the state of both sets of rows, from the eigenpairs of both states. Cost O(d l²)."""
        moments = self.moments.merged(other.moments)
        probes_ds, images_ds = map(solver_copy, alone(self._about_mean(slice(self.width, None))))
        images_ds += solver_copy(alone(other._about_mean(slice(other.width, None)))[1])
        if self.center:
            weight, difference_d = between_means(self.moments, other.moments)
            difference_d, offset_d = difference_d.to(images_ds), moments.offset_d.to(images_ds)
            images_ds += weight * torch.outer(difference_d, difference_d @ probes_ds)
            images_ds += moments.n_rows * torch.outer(offset_d, offset_d @ probes_ds)
        wider = self if self.width >= other.width else other
        sums_dm = torch.cat([wider.sums_dm[:, : wider.width].to(self.sums_dm), images_ds.to(self.sums_dm)], dim=1)
        state = type(self)(self.wanted, moments, wider.columns_dm, sums_dm)
        vectors_dp, values_p = merge_eigenpairs(self, other)
        pairs = vectors_dp, values_p[: wider.width].to(sums_dm)
        _, is_massive = alone(state._judged(*pairs, is_asked=False))
        alone(state._restart(pairs, width=wider.width, needs_full_precision=is_massive))
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
        columns_dm = _new_columns(len(probed_ds), width + N_PROBES, seed=seed, device=probed_ds.device)
        sums_dm = torch.cat([probed_ds.new_zeros(len(probed_ds), width), probed_ds], dim=1)
        state = cls(wanted, moments, columns_dm, sums_dm)
        pairs = (tensors["vectors"], tensors["values"])
        alone(state._restart(pairs, width=width, needs_full_precision=bool(full)))
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


def _new_columns(n_features: int, n_columns: int, *, seed: int, device: torch.device) -> Tensor:
    """Return random columns (d, m); the last are the probes, the same in all sketches so that these merge."""
    random_dm = _random_columns(n_features, n_columns, seed=seed, is_pinned=device.type == "cuda")
    return random_dm.to(device, copy=True, non_blocking=True)


@functools.lru_cache(maxsize=8)
def _random_columns(n_features: int, n_columns: int, *, seed: int, is_pinned: bool) -> Tensor:
    """Return Gaussian columns (d, m), on the CPU, which inputs of one width share: they must not be changed.

    With `is_pinned` the host does not wait for copies of them.
    """
    generator = torch.Generator().manual_seed(PROBE_SEED)
    probes_ds = torch.randn(n_features, N_PROBES, generator=generator, device="cpu")
    generator.manual_seed(seed)
    test_dl = torch.randn(n_features, n_columns - N_PROBES, generator=generator, device="cpu")
    random_dm = torch.cat([test_dl, probes_ds], dim=1).to(torch.bfloat16)
    return random_dm.pin_memory() if is_pinned else random_dm


def _about_mean(sum_d: Tensor, columns_dm: Tensor, sums_dm: Tensor, *, n_rows: int) -> tuple[Tensor, Tensor]:
    """Return columns Q and (S - n o oᵀ) Q from S Q, with o the offset of the mean from the shift, each (d, m)."""
    offset_d, columns_dm = (sum_d / n_rows).to(sums_dm), columns_dm.to(sums_dm)
    return columns_dm, plus_outer(sums_dm, offset_d, row_times(offset_d, columns_dm), weight=-n_rows)


def _restarted(
    vectors_dp: Tensor,
    values_p: Tensor,
    test_dl: Tensor,
    probes_ds: Tensor,
    images_ds: Tensor,
    sum_d: Tensor,
    *,
    n_rows: int,
) -> tuple[Tensor, Tensor]:
    """Return columns and sums as they would be if S were V Λ Vᵀ and Q had always been this test matrix, each (d, m).

    With `n_rows`, S is V Λ Vᵀ + n o oᵀ: the offset o of the mean from the shift counts.
    """
    test_dl = rounded(test_dl)
    sketch_dl = vectors_dp @ (values_p[..., None] * (vectors_dp.mT @ test_dl))
    if n_rows:
        offset_d = (sum_d / n_rows).to(test_dl)
        sketch_dl = plus_outer(sketch_dl, offset_d, row_times(offset_d, test_dl), weight=n_rows)
    return torch.cat([test_dl.to(probes_ds), probes_ds], dim=-1), torch.cat([sketch_dl, images_ds], dim=-1)


def _straightened(vectors_dp: Tensor, values_p: Tensor, *, n_components: int) -> Pairs:
    """Return eigenpairs in float64; the first k, orthonormal up to rounding in float32, are corrected."""
    vectors_dp = solver_copy(vectors_dp)
    leading_dk = vectors_dp[..., :n_components]
    eye_kk = torch.eye(leading_dk.shape[-1], dtype=leading_dk.dtype, device=leading_dk.device)
    leading_dk -= leading_dk @ (leading_dk.mT @ leading_dk - eye_kk) / 2
    return vectors_dp, solver_copy(values_p)
