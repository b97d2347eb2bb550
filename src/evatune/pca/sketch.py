"""Sketched streaming PCA: a Nyström sketch Y = S Q, (d, l), whose test matrix Q follows the data.

Shapes: n rows, d features, k components, l >= k sketch columns, s probes, p eigenpairs.

S = Σ z zᵀ is the second moment of the shifted rows; it is never formed. A batch costs the two thin products
P = Z Q and Y += Zᵀ P, O(n d l). Whenever the rows since the last refresh are as many as the rows before it, S is
approximated from the sketch by the Nyström formula Y (QᵀY)⁺ Yᵀ, its l leading eigenvectors become the new Q, and Y
restarts from what that approximation knows of the past. So the test matrix goes through one step of subspace iteration
at every doubling of the data, and refreshes cost five products of O(d l²) at logarithmically many batches.

A fixed random Q would collapse on slowly decaying spectra; the leading eigenvectors of the rows so far do not. What
they still lose is the past outside of the sketch, and that is estimated: a few random probes Ω, which never change and
take no part in the approximation, ride along, so that W = S Ω is known of all rows. For an eigenpair (v, λ) of the
approximation, vᵀW - λ vᵀΩ has mean square ‖S v - λ v‖², the residual of the pair in the true matrix. Where it says that
the components miss more than asked, the sketch gets wider, or gives way to the exact second moment.

References: Gittens and Mahoney (2013) and Tropp, Yurtsever, Udell and Cevher (2017) for the Nyström approximation with
a shift; Levy and Lindenbaum (2000) for sequential bases; Tropp, Yurtsever, Udell and Cevher (2019) for estimates of
errors from random probes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evatune.pca.eigen import missed_variance
from evatune.pca.exact import ExactState
from evatune.pca.moments import Moments
from evatune.pca.nystrom import nystrom_eigenpairs
from evatune.pca.products import accumulate_product, unrounded
from evatune.pca.subspace import complete_basis, eigenpairs_of_factor, solver_copy
from evatune.pca.threads import one_thread

FIRST_BATCH_ITERATIONS = 2
"""Subspace iterations on the first batch, which starts from a random test matrix."""

HALF_PRECISION_NOISE = 1e-2
"""How large a residual, relative to the k-th eigenvalue, bfloat16 may seem to make; its square is what is missed."""

MASSIVE_RATIO = 1e5
"""Where the largest eigenvalue of a sketch exceeds its smallest by this factor, bfloat16 drowns the latter."""

SAFETY = 4
"""A sketch is widened when it seems to miss the tolerance divided by this: what it has missed by then stays missed."""

SETTLED = 2
"""After this times k² rows a sketch is held to its tolerance; after fewer it may miss more in proportion.

Neighbours among k eigenvalues are about a share 1/k apart, and n rows tell eigenvectors apart where the root of n is
well above k. Before, most of what a sketch misses is that axes turn with every batch, which falls as rows come. But for
the first batch, of which all rows are at hand: what a sketch misses of it is for want of columns.
"""

GROWTH = 1 / 2
"""Columns beside those of the components grow with this power of what a sketch misses over what it may miss."""

N_PROBES = 8
"""The estimate of the residuals of k components has a relative deviation of √(2 / (s k))."""

WIDEST = 4
"""A sketch gets at most so many times the columns, beside those of the components, with which it began."""

PROBE_SEED = 0x9E3779B9
"""Of the probes, whatever the seed of the test matrix."""

EXACT_UP_TO = 2048
"""Features up to which the exact second moment, of 16 MiB in float32 then, may take a sketch's place."""


def sketch_width(n_components: int, n_features: int) -> int:
    """Return with how many columns, beside the probes, a sketch of these components of these features begins."""
    return min(n_features, _whole_tiles(n_components + 96 - N_PROBES))


def widest_sketch(n_components: int, n_features: int) -> int:
    """Return how many columns, beside the probes, such a sketch has at most."""
    width = sketch_width(n_components, n_features)
    most = n_features // 4
    if n_features <= EXACT_UP_TO and 2 * width > most:
        return width
    return max(width, min(_whole_tiles(n_components + WIDEST * (width - n_components)), most))


def _whole_tiles(width: int) -> int:
    """Round a width up, so that with the probes it is a multiple of 16."""
    return -(-(width + N_PROBES) // 16) * 16 - N_PROBES


class SketchState:
    """Test matrix and probes [Q Ω], sketches [Y W] = S [Q Ω], and when they were refreshed.

    Args:
        columns_dm: test matrix and probes, (d, m) with m = l + s.
        sums_dm: their products with S, (d, m).
        n_components: k.
        tolerance: share of the variance that the best k components capture that ours may miss; of the first half of
            them, a tenth of it. More while rows are few, see `SETTLED`. None lets the sketch be as it is.
        seed: of everything random.
    """

    def __init__(
        self,
        columns_dm: Tensor,
        sums_dm: Tensor,
        *,
        n_components: int,
        tolerance: float | None,
        seed: int,
        n_rows_refreshed: int = 0,
        needs_full_precision: bool = False,
    ) -> None:
        self.columns_dm = columns_dm
        self.sums_dm = sums_dm
        self.n_components = n_components
        self.tolerance = tolerance
        self.seed = seed
        self.n_rows_refreshed = n_rows_refreshed
        self.needs_full_precision = needs_full_precision
        self._known: tuple[Tensor, Tensor] | None = None

    @classmethod
    def start(cls, first_nd: Tensor, n_components: int, *, tolerance: float | None, seed: int) -> SketchState:
        """Return the empty state for rows like these, (n, d), with a random test matrix."""
        n_features = first_nd.shape[1]
        columns_dm = _random_columns(n_features, sketch_width(n_components, n_features) + N_PROBES, seed=seed)
        return cls(
            columns_dm.to(first_nd),
            torch.zeros_like(columns_dm).to(first_nd),
            n_components=n_components,
            tolerance=tolerance,
            seed=seed,
        )

    @property
    def width(self) -> int:
        """How many columns the sketch has beside the probes, l."""
        return self.columns_dm.shape[1] - N_PROBES

    def update(
        self, shifted_nd: Tensor, moments: Moments, *, center: bool, product_dtype: torch.dtype
    ) -> SketchState | ExactState:
        """Add shifted rows, (n, d), and return the state to go on with; `moments` include them already."""
        if self.n_rows_refreshed == 0:
            test_dl = self.columns_dm[:, : self.width]
            for _ in range(FIRST_BATCH_ITERATIONS):
                image_dl = shifted_nd.T @ (shifted_nd @ test_dl)
                with one_thread():
                    test_dl = torch.linalg.qr(image_dl.cpu() if image_dl.device.type == "mps" else image_dl).Q
                test_dl = _rounded(test_dl).to(self.columns_dm)
            self.columns_dm[:, : self.width] = test_dl
            self._add(shifted_nd)
            state = self._reviewed(moments, center=center)
            if isinstance(state, ExactState):  # nothing needs to be lost, with all rows at hand
                state = ExactState.start(shifted_nd)
                state.update(shifted_nd, moments, center=center, product_dtype=product_dtype)
            return state
        self._add(shifted_nd if self.needs_full_precision else shifted_nd.to(product_dtype))
        return self._reviewed(moments, center=center) if moments.n_rows >= 2 * self.n_rows_refreshed else self

    def _add(self, rows_nd: Tensor) -> None:
        self._known = None
        projected_nm = rows_nd @ self.columns_dm.to(rows_nd.dtype)
        accumulate_product(self.sums_dm, rows_nd.T, projected_nm)

    def refresh(self, moments: Moments, *, center: bool) -> None:
        """Make the leading eigenvectors of the rows so far the test matrix."""
        if self._known is None:
            self._restart(*self._eigenpairs(moments, center=center), moments, center=center, width=self.width)

    def _reviewed(self, moments: Moments, *, center: bool) -> SketchState | ExactState:
        """Refresh, and return the state to go on with.

        That is this state, perhaps wider, or an exact one where the sketch is not good enough and the rows are narrow.
        """
        vectors_dp, values_p = self._eigenpairs(moments, center=center)
        width = self.width
        excess = self._excess(vectors_dp, values_p, moments, center=center)
        if excess > 1:
            n_features = len(vectors_dp)
            widest = widest_sketch(self.n_components, n_features)
            if width < widest:
                spare = math.ceil(excess**GROWTH * (width - self.n_components))
                width = min(_whole_tiles(self.n_components + spare), widest)
            elif n_features <= EXACT_UP_TO:
                return self.exactly(moments, center=center)
        self._restart(vectors_dp, values_p, moments, center=center, width=width)
        return self

    def exactly(self, moments: Moments, *, center: bool) -> ExactState:
        """Return what the sketch knows as an exact state, which remembers what the sketch misses."""
        with unrounded(self.sums_dm):
            vectors_dp, values_p = self._eigenpairs(moments, center=center)
            missed = float(self._missed(vectors_dp, values_p, moments, center=center).sum())
            return ExactState.of_eigenpairs(vectors_dp, values_p, moments, center=center, missed=missed)

    def missed_share(self, moments: Moments, *, center: bool) -> float:
        """Estimate how much of the variance that the best k components capture ours miss, as a share of it."""
        vectors_dp, values_p = self._eigenpairs(moments, center=center)
        if not len(values_p):
            return 0.0
        missed_k = self._missed(vectors_dp, values_p, moments, center=center)
        return float(missed_k.sum() / values_p[: len(missed_k)].sum())

    def _excess(self, vectors_dp: Tensor, values_p: Tensor, moments: Moments, *, center: bool) -> float:
        """Return how many times as much as it may the sketch seems to miss."""
        if self.tolerance is None or not len(values_p):
            return 0.0
        missed_k = self._missed(vectors_dp, values_p, moments, center=center)
        n_half = (len(missed_k) + 1) // 2
        share = missed_k.sum() / values_p[: len(missed_k)].sum()
        share_of_half = missed_k[:n_half].sum() / values_p[:n_half].sum()
        allowed = self.tolerance / SAFETY
        if self.n_rows_refreshed:
            allowed *= max(1.0, SETTLED * self.n_components**2 / moments.n_rows)
        return float(torch.maximum(share, 10 * share_of_half)) / allowed

    def _missed(self, vectors_dp: Tensor, values_p: Tensor, moments: Moments, *, center: bool) -> Tensor:
        """Estimate what each of the first k components misses, (k,), in the units of the eigenvalues.

        By second-order perturbation, an eigenpair (v, λ) with residual ρ misses ρ² / (λ - μ) to directions of smaller
        eigenvalues μ, and never more than ρ. Outside of the sketch, these are at most about its last eigenvalue.
        """
        if not len(values_p):
            return values_p
        components_dk, values_k = (solver_copy(pairs[..., : self.n_components]) for pairs in (vectors_dp, values_p))
        probes_ds = solver_copy(self.columns_dm[:, self.width :])
        images_ds = solver_copy(self._scatter_of(slice(self.width, None), moments, center=center))
        residuals_ks = components_dk.T @ images_ds - values_k[:, None] * (components_dk.T @ probes_ds)
        residuals_k = residuals_ks.square().mean(dim=1).sqrt()
        return missed_variance(residuals_k, values_k, solver_copy(values_p[-1]))

    def _restart(self, vectors_dp: Tensor, values_p: Tensor, moments: Moments, *, center: bool, width: int) -> None:
        """Continue with `width` columns from known eigenpairs of the scatter matrix, (d, p) and (p,)."""
        # Rounded as they are saved, so that a state that was loaded goes on with the very same numbers.
        vectors_dp = vectors_dp[:, :width].to(self.columns_dm).contiguous()
        values_p = values_p[:width].to(self.sums_dm)
        test_dl = vectors_dp
        if len(values_p) < width:
            with one_thread():
                known_dp = vectors_dp.cpu() if vectors_dp.device.type == "mps" else vectors_dp
                test_dl = complete_basis(known_dp, width, seed=self.seed + moments.n_rows).to(vectors_dp)
        test_dl = _rounded(test_dl)
        # What the sketch would be, had S been V Λ Vᵀ (+ n o oᵀ about the shift) and this the test matrix all along.
        sketch_dl = vectors_dp @ (values_p[:, None] * (vectors_dp.T @ test_dl))
        if center:
            offset_d = moments.offset_d.to(test_dl)
            sketch_dl.addr_(offset_d, offset_d @ test_dl, alpha=moments.n_rows)
        old_width = self.width
        self.columns_dm = torch.cat([test_dl, self.columns_dm[:, old_width:]], dim=1)
        self.sums_dm = torch.cat([sketch_dl, self.sums_dm[:, old_width:]], dim=1)
        self.n_rows_refreshed = moments.n_rows
        self._known = vectors_dp, values_p
        self.needs_full_precision = self._is_massive(values_p)

    def _is_massive(self, values_p: Tensor) -> bool:
        """Tell whether a few directions are so large that bfloat16 would drown the others.

        Each entry of a probe's product is rounded by a relative 2⁻⁹, and is of the order of λ₁ / √d.
        """
        if not len(values_p):
            return False
        smallest = values_p[min(self.n_components, len(values_p)) - 1]
        noise = 2.0**-9 * values_p[0] / len(self.columns_dm) ** 0.5
        return bool(noise > HALF_PRECISION_NOISE * smallest or values_p[0] > MASSIVE_RATIO * values_p[-1])

    def _scatter_of(self, part: slice, moments: Moments, *, center: bool) -> Tensor:
        """Return the products of the scatter matrix with some of the columns, (d, at most m)."""
        sums_dm = self.sums_dm[:, part]
        if not center:
            return sums_dm
        offset_d = moments.offset_d.to(sums_dm)
        return sums_dm.addr(offset_d, offset_d @ self.columns_dm[:, part], alpha=-moments.n_rows)

    def decompose(self, moments: Moments, *, center: bool) -> tuple[Tensor, Tensor]:
        """Return approximate eigenvectors of the scatter matrix in columns (d, p) and its eigenvalues (p,), descending.

        In float64. The state is not changed. p <= l leaves out directions in which the rows so far do not vary.
        """
        vectors_dp, values_p = (solver_copy(pairs) for pairs in self._eigenpairs(moments, center=center))
        leading_dk = vectors_dp[:, : self.n_components]  # orthonormal to the rounding of the sums, and now beyond it
        leading_dk -= leading_dk @ (leading_dk.T @ leading_dk - torch.eye(leading_dk.shape[1]).to(leading_dk)) / 2
        return vectors_dp, values_p

    def _eigenpairs(self, moments: Moments, *, center: bool) -> tuple[Tensor, Tensor]:
        """Return what `decompose` does in the dtype of the sums."""
        if self._known is not None:  # no rows since the last refresh
            return self._known
        return nystrom_eigenpairs(
            self.columns_dm[:, : self.width], self._scatter_of(slice(self.width), moments, center=center)
        )

    def merged(self, other: SketchState, mine: Moments, theirs: Moments, *, center: bool) -> SketchState:
        """Return the state of both sets of rows, from the eigenpairs of either. Cost O(d l²)."""
        vectors_dp, values_p = merge_eigenpairs(
            self.decompose(mine, center=center), other.decompose(theirs, center=center), mine, theirs, center=center
        )
        both = mine.merged(theirs)
        images_ds = solver_copy(self._scatter_of(slice(self.width, None), mine, center=center))
        images_ds += solver_copy(other._scatter_of(slice(other.width, None), theirs, center=center))
        probes_ds = solver_copy(self.columns_dm[:, self.width :])
        if center:
            weight, difference_d = _between(mine, theirs)
            difference_d, offset_d = difference_d.to(images_ds), both.offset_d.to(images_ds)
            images_ds += weight * torch.outer(difference_d, difference_d @ probes_ds)
            images_ds += both.n_rows * torch.outer(offset_d, offset_d @ probes_ds)
        wider = self if self.width >= other.width else other
        sums_dm = torch.cat([wider.sums_dm[:, : wider.width].to(self.sums_dm), images_ds.to(self.sums_dm)], dim=1)
        state = SketchState(
            wider.columns_dm, sums_dm, n_components=self.n_components, tolerance=self.tolerance, seed=self.seed
        )
        state._restart(vectors_dp, values_p, both, center=center, width=wider.width)
        return state

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors; right after a refresh, its eigenpairs (d, l), (l,) stand for test and sketch."""
        numbers = [self.seed, self.n_rows_refreshed, int(self.needs_full_precision), self.width]
        counters = torch.tensor(numbers)
        if self._known is None:
            return {"columns": self.columns_dm, "sums": self.sums_dm, "counters": counters}
        vectors_dp, values_p = self._known
        probed_ds = self.sums_dm[:, self.width :]
        return {"vectors": vectors_dp, "values": values_p, "probed": probed_ds, "counters": counters}

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], moments: Moments, *, center: bool, n_components: int, tolerance: float | None
    ) -> SketchState:
        """Return the state that `tensors` describes, of rows with these moments."""
        seed, n_rows_refreshed, full, width = tensors["counters"].tolist()
        if "vectors" not in tensors:
            return cls(
                tensors["columns"],
                tensors["sums"],
                n_components=n_components,
                tolerance=tolerance,
                seed=seed,
                n_rows_refreshed=n_rows_refreshed,
                needs_full_precision=bool(full),
            )
        probed_ds = tensors["probed"]
        columns_dm = _random_columns(len(probed_ds), width + N_PROBES, seed=seed).to(probed_ds)
        sums_dm = torch.cat([torch.zeros_like(columns_dm[:, :width]), probed_ds], dim=1)
        state = cls(columns_dm, sums_dm, n_components=n_components, tolerance=tolerance, seed=seed)
        with unrounded(probed_ds):
            state._restart(tensors["vectors"], tensors["values"], moments, center=center, width=width)
        return state


def _random_columns(n_features: int, n_columns: int, *, seed: int) -> Tensor:
    """Return Gaussian columns (d, m), of which the last are the probes: everywhere the same, so that sketches merge."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    probes_ds = torch.randn(n_features, N_PROBES, generator=generator)
    generator.manual_seed(seed)
    test_dl = torch.randn(n_features, n_columns - N_PROBES, generator=generator)
    return _rounded(torch.cat([test_dl, probes_ds], dim=1))


def _rounded(columns_dm: Tensor) -> Tensor:
    """Round columns to bfloat16, so that half-precision products see the very same ones as the formulas do.

    It also keeps columns apart from the null space of the rows: what a column sees of the large directions is then far
    above rounding errors, which the Nyström formula would divide by themselves.
    """
    return columns_dm.to(torch.bfloat16).to(columns_dm.dtype)


def merge_eigenpairs(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], mine: Moments, theirs: Moments, *, center: bool
) -> tuple[Tensor, Tensor]:
    """Return the eigenpairs of the sum of two low-rank scatter matrices.

    Args:
        first: eigenvectors in columns (d, p) and eigenvalues (p,) of one set of rows.
        second: the same of the other, (d, q) and (q,).
        mine: moments of the first set.
        theirs: moments of the second set.
        center: whether the scatter matrices are about the means; their difference then adds one direction.

    Returns:
        Eigenvectors (d, at most p + q + 1) and eigenvalues, descending.
    """
    factors = [vectors * values.sqrt() for vectors, values in (first, second)]
    if center and mine.n_rows and theirs.n_rows:
        weight, difference_d = _between(mine, theirs)
        factors.append(weight**0.5 * difference_d.to(factors[0])[:, None])
    return eigenpairs_of_factor(torch.cat(factors, dim=1))


def _between(mine: Moments, theirs: Moments) -> tuple[float, Tensor]:
    """Return weight and direction (d,) of what the difference of two means adds to the scatter of both sets of rows."""
    weight = mine.n_rows * theirs.n_rows / max(mine.n_rows + theirs.n_rows, 1)
    return weight, solver_copy(mine.mean_d) - solver_copy(theirs.mean_d)
