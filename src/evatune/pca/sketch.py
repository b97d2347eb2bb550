"""Sketched streaming PCA: a Nyström sketch Y = S Q, (d, l), whose test matrix Q follows the data.

Shapes: n rows, d features, l sketch columns, k <= l components.

S = Σ z zᵀ is the second moment of the shifted rows; it is never formed. A batch costs the two thin products
P = Z Q and Y += Zᵀ P, O(n d l). Whenever the rows since the last refresh are as many as the rows before it, S is
approximated from the sketch by the Nyström formula Y (QᵀY)⁺ Yᵀ, its l leading eigenvectors become the new Q, and Y
restarts from what that approximation knows of the past. So the test matrix goes through one step of subspace iteration
at every doubling of the data, and refreshes cost O(d l²) at logarithmically many batches.

A fixed random Q would collapse on slowly decaying spectra; the leading eigenvectors of the rows so far do not.

References: Gittens and Mahoney (2013) and Tropp, Yurtsever, Udell and Cevher (2017) for the Nyström approximation with
a shift; Levy and Lindenbaum (2000) for sequential bases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.pca.moments import Moments
from evatune.pca.products import accumulate_product
from evatune.pca.subspace import complete_basis, eigenpairs_of_factor, one_thread, solver_copy

FIRST_BATCH_ITERATIONS = 3
"""Subspace iterations on the first batch, which starts from a random test matrix."""

MASSIVE_RATIO = 1e5
"""Where the largest eigenvalue of a sketch exceeds its smallest by this factor, bfloat16 would drown the latter."""


def sketch_width(n_components: int, n_features: int) -> int:
    """Return how many columns the sketch of `n_components` components of `n_features` features has."""
    return min(n_features, -(-max(2 * n_components, n_components + 48) // 16) * 16)


class SketchState:
    """Test matrix Q, sketch Y = S Q, and when they were refreshed."""

    def __init__(
        self,
        test_dl: Tensor,
        sketch_dl: Tensor,
        *,
        seed: int,
        n_rows_refreshed: int = 0,
        needs_full_precision: bool = False,
    ) -> None:
        self.test_dl = test_dl
        self.sketch_dl = sketch_dl
        self.seed = seed
        self.n_rows_refreshed = n_rows_refreshed
        self.needs_full_precision = needs_full_precision
        self._known: tuple[Tensor, Tensor] | None = None

    @classmethod
    def start(cls, first_nd: Tensor, width: int, *, seed: int) -> SketchState:
        """Return the empty state for rows like these, (n, d), with a random test matrix of `width` columns."""
        generator = torch.Generator().manual_seed(seed)
        test_dl = torch.randn(first_nd.shape[1], width, generator=generator).to(first_nd)
        return cls(test_dl, torch.zeros_like(test_dl), seed=seed)

    def update(self, shifted_nd: Tensor, moments: Moments, *, center: bool, product_dtype: torch.dtype) -> None:
        """Add shifted rows, (n, d); `moments` include them already."""
        if self.needs_full_precision:
            product_dtype = shifted_nd.dtype
        rows_nd = shifted_nd.to(product_dtype)
        if self.n_rows_refreshed == 0:
            for _ in range(FIRST_BATCH_ITERATIONS):
                self.sketch_dl.zero_()
                self._add(shifted_nd)
                self.refresh(moments, center=center)
            return
        self._add(rows_nd)
        if moments.n_rows >= 2 * self.n_rows_refreshed:
            self.refresh(moments, center=center)

    def _add(self, rows_nd: Tensor) -> None:
        self._known = None
        projected_nl = rows_nd @ self.test_dl.to(rows_nd.dtype)
        accumulate_product(self.sketch_dl, rows_nd.T, projected_nl)

    def refresh(self, moments: Moments, *, center: bool) -> None:
        """Make the leading eigenvectors of the rows so far the test matrix."""
        with one_thread():
            vectors_dp, values_p = self.decompose(moments, center=center)
            self.restart(vectors_dp, values_p, moments, center=center)

    def restart(self, vectors_dp: Tensor, values_p: Tensor, moments: Moments, *, center: bool) -> None:
        """Continue from known eigenpairs of the scatter matrix: columns (d, p) and eigenvalues (p,)."""
        width = self.test_dl.shape[1]
        # Rounded as they are saved, so that a state that was loaded goes on with the very same numbers.
        vectors_dp = solver_copy(vectors_dp[:, :width].to(self.test_dl)).contiguous()
        values_p = values_p[:width]
        basis_dl = complete_basis(vectors_dp, width, seed=self.seed + moments.n_rows)
        # Rounded to bfloat16 now, so that half-precision products see the very same test matrix as the formulas do.
        test_dl = basis_dl.to(torch.bfloat16).to(basis_dl)
        # What the sketch would be, had S been V Λ Vᵀ (+ n o oᵀ about the shift) and this the test matrix all along.
        sketch_dl = vectors_dp @ (values_p[:, None] * (vectors_dp.T @ test_dl))
        if center:
            offset_d = moments.offset_d.to(test_dl)
            sketch_dl += moments.n_rows * torch.outer(offset_d, offset_d @ test_dl)
        self.test_dl = test_dl.to(self.test_dl)
        self.sketch_dl = sketch_dl.to(self.sketch_dl)
        self.n_rows_refreshed = moments.n_rows
        self._known = vectors_dp.to(self.test_dl), values_p
        self.needs_full_precision = bool(values_p[0] > MASSIVE_RATIO * values_p[-1]) if len(values_p) else False

    def decompose(self, moments: Moments, *, center: bool) -> tuple[Tensor, Tensor]:
        """Return approximate eigenvectors of the scatter matrix in columns (d, p) and its eigenvalues (p,), descending.

        The state is not changed. p <= l leaves out directions in which the rows so far do not vary.
        """
        if self._known is not None:  # no rows since the last refresh
            return solver_copy(self._known[0]), self._known[1]
        test_dl, sketch_dl = solver_copy(self.test_dl), solver_copy(self.sketch_dl)
        n_features, width = test_dl.shape
        if center:
            offset_d = moments.offset_d.to(sketch_dl)
            sketch_dl -= moments.n_rows * torch.outer(offset_d, offset_d @ test_dl)
        core_ll = test_dl.T @ sketch_dl
        core_ll = (core_ll + core_ll.T) / 2
        # A column that sees no variance holds rounding errors, which the formula would divide by themselves.
        energy_l = core_ll.diagonal()
        noise_l = torch.linalg.vector_norm(sketch_dl, dim=0) * (1e-3 / n_features**0.5)
        rounding = torch.finfo(self.sketch_dl.dtype).eps
        alive_l = energy_l > torch.maximum(noise_l, energy_l.sum() * rounding**2)
        if not alive_l.any():
            return test_dl[:, :0], energy_l[:0]
        # Massive activations make the core span many orders of magnitude. With a unit diagonal, the cut-off is relative
        # to each direction and not to the largest one.
        scale_m = energy_l[alive_l].rsqrt()
        core_mm = core_ll[alive_l][:, alive_l] * scale_m * scale_m[:, None]
        values_m, vectors_mm = torch.linalg.eigh(core_mm)
        keep = values_m > values_m[-1] * width * rounding
        factor_dm = sketch_dl[:, alive_l] @ (scale_m[:, None] * vectors_mm[:, keep] / values_m[keep].sqrt())
        return eigenpairs_of_factor(factor_dm)

    def merged(self, other: SketchState, mine: Moments, theirs: Moments, *, center: bool) -> SketchState:
        """Return the state of both sets of rows, from the eigenpairs of either. Cost O(d l²)."""
        vectors_dp, values_p = merge_eigenpairs(
            self.decompose(mine, center=center), other.decompose(theirs, center=center), mine, theirs, center=center
        )
        state = SketchState(self.test_dl, self.sketch_dl, seed=self.seed)
        state.restart(vectors_dp, values_p, mine.merged(theirs), center=center)
        return state

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors; right after a refresh, its eigenpairs (d, l), (l,) are all there is to it."""
        counters = torch.tensor([self.seed, self.n_rows_refreshed, int(self.needs_full_precision)])
        if self._known is None:
            return {"test": self.test_dl, "sketch": self.sketch_dl, "counters": counters}
        vectors_dp, values_p = self._known
        missing = self.test_dl.shape[1] - values_p.shape[0]
        pad = torch.nn.functional.pad
        return {"vectors": pad(vectors_dp, (0, missing)), "values": pad(values_p, (0, missing)), "counters": counters}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], moments: Moments, *, center: bool) -> SketchState:
        """Return the state that `tensors` describes, of rows with these moments."""
        seed, n_rows_refreshed, full = tensors["counters"].tolist()
        if "vectors" in tensors:
            empty_dl = torch.zeros_like(tensors["vectors"])
            state = cls(empty_dl, empty_dl, seed=seed)
            known = tensors["values"] > 0
            state.restart(solver_copy(tensors["vectors"])[:, known], tensors["values"][known], moments, center=center)
            return state
        return cls(
            tensors["test"],
            tensors["sketch"],
            seed=seed,
            n_rows_refreshed=n_rows_refreshed,
            needs_full_precision=bool(full),
        )


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
        weight = (mine.n_rows * theirs.n_rows / (mine.n_rows + theirs.n_rows)) ** 0.5
        difference_d = (mine.mean_d.double() - theirs.mean_d.double()).to(factors[0])
        factors.append(weight * difference_d[:, None])
    return eigenpairs_of_factor(torch.cat(factors, dim=1))
