"""Leading eigenpairs of a symmetric positive matrix by iteration on the matrix.

Shapes: d features, l columns, p <= l eigenpairs.

Reference: Zhou, Saad, Tiago and Chelikowsky (2006) for subspace iteration with a Chebyshev filter.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from evatune.pca.subspace import solver_copy
from evatune.pca.together import Eigh, Host, Orthonormal, Steps

FULL_UP_TO = 256
"""Width up to which a full eigendecomposition is quicker than iterating."""

ITERATE_FROM = 6
"""Iteration is used only where the matrix is at least this many times as wide as the block of iterated columns;
a narrower matrix is factorized in full."""

APART = 0.02
"""An eigenvector stands apart if its eigenvalue differs from both neighbours by at least this share of itself. The
direction of any other eigenvector is not checked."""

ANGLE = 16
"""Allowed angle between such an eigenvector and its estimate, in units of √tolerance."""

OVERSAMPLING = 16
"""How many columns are iterated beside one for each wanted pair. With more of them the pairs converge faster: in each
round the error of a pair shrinks by the ratio of the first eigenvalue left out to its own."""

DEGREE = 3
"""Degree of the Chebyshev filter. With a higher degree, float32 rounding errors of large eigenvectors would hide the
small ones."""

TINY = 1e-30
"""Length that a column of zeros is taken to have."""

ZERO_ROUNDINGS = 10
"""An eigenvalue counts as zero below this many times the machine epsilon of the largest one."""

MAX_ROUNDS = 16
"""After this many rounds without convergence the matrix is factorized in full; its spectrum decays too slowly."""


def leading_eigenpairs(
    matrix_dd: Tensor,
    n_pairs: int,
    *,
    tolerance: float,
    near_dl: Tensor | None = None,
    n_rounds: int | None = None,
) -> Steps[tuple[Tensor, Tensor]]:
    """Return the leading eigenpairs of a symmetric positive matrix, or all of them where that is quicker.

    Subspace iteration with a Chebyshev filter. It ends when the residuals ‖S v - λ v‖ show two things: the wanted pairs
    miss on average at most the share `tolerance` of their eigenvalues, and each wanted eigenvector that stands apart
    (`APART`) is found up to an angle of `ANGLE` √tolerance.

    Args:
        matrix_dd: the matrix, (d, d).
        n_pairs: how many pairs are wanted.
        tolerance: share of their eigenvalues that the wanted pairs may miss on average.
        near_dl: columns that nearly span the wanted eigenvectors, from a similar matrix, (d, l).
        n_rounds: take exactly this many rounds, whatever the residuals are.

    Returns:
        Orthonormal eigenvectors in columns (d, p) and eigenvalues (p,), descending; p >= n_pairs if the
        matrix has that many nonzero eigenvalues. Cost O(d² p) a round, or O(d³).
    """
    n_features = matrix_dd.shape[0]
    width = n_pairs + OVERSAMPLING
    if n_features <= FULL_UP_TO or ITERATE_FROM * width > n_features:
        return (yield from _all_eigenpairs(matrix_dd))
    if near_dl is None or near_dl.shape[1] < width:
        near_dl = matrix_dd @ _random_columns(n_features, width).to(matrix_dd, non_blocking=True)
    basis_dl = yield from _basis_of(near_dl[:, :width].to(matrix_dd))
    zero = ZERO_ROUNDINGS * torch.finfo(matrix_dd.dtype).eps
    for n_done in range(MAX_ROUNDS):
        basis_dl, image_dl, values_l = yield from _ritz_pairs(matrix_dd, basis_dl)
        if n_rounds is None or n_done == n_rounds:
            residual_l = torch.linalg.vector_norm(image_dl - basis_dl * values_l, dim=0)
            residual_l[values_l <= zero * values_l[0]] = 0.0
            is_enough = _settled(residual_l, values_l, n_pairs=n_pairs, tolerance=tolerance)
            n_seen = (values_l > zero * values_l[0].clamp_min(0.0)).sum()
            enough, seen = yield Host(torch.stack([is_enough.to(values_l), n_seen.to(values_l)]))
            if enough or n_rounds is not None:
                return basis_dl[:, : int(seen)], values_l[: int(seen)]
        basis_dl = yield from _basis_of(_filtered(matrix_dd, basis_dl, image_dl, values_l))
    return (yield from _all_eigenpairs(matrix_dd))


@functools.lru_cache(maxsize=8)
def _random_columns(n_features: int, width: int) -> Tensor:
    """Return Gaussian columns (d, l), on the CPU, which inputs of one width share: they must not be changed."""
    generator = torch.Generator().manual_seed(n_features)
    return torch.randn(n_features, width, generator=generator, device="cpu")


def missed_variance(residual_k: Tensor, values_k: Tensor, beyond: Tensor) -> Tensor:
    """Estimate what each of some eigenpairs misses, (k,), in the units of the eigenvalues.

    By second-order perturbation, a pair (v, λ) with residual ρ misses ρ² / (λ - μ) to directions of eigenvalue μ, and
    at most ρ.

    Args:
        residual_k: norms of the residuals S v - λ v, (k,).
        values_k: λ, (k,).
        beyond: μ, about the largest eigenvalue of the directions that were left out.
    """
    tiny = torch.finfo(values_k.dtype).tiny
    return residual_k.square() / torch.maximum(values_k - beyond, residual_k).clamp_min(tiny)


def _settled(residual_l: Tensor, values_l: Tensor, *, n_pairs: int, tolerance: float) -> Tensor:
    """Tell whether the first `n_pairs` pairs meet both conditions of `leading_eigenpairs`."""
    residual_k, values_k = residual_l[:n_pairs], values_l[:n_pairs]
    missed_k = missed_variance(residual_k, values_k, values_l[-1])
    gap_l = values_l[:-1] - values_l[1:]
    gap_k = torch.minimum(gap_l[:n_pairs], torch.cat([values_l[:1], gap_l])[:n_pairs])
    turned_k = (residual_k > ANGLE * tolerance**0.5 * gap_k) & (gap_k >= APART * values_k)
    smallest = torch.finfo(values_k.dtype).tiny
    return ((missed_k / values_k.clamp_min(smallest)).mean() <= tolerance) & ~turned_k.any()


def _basis_of(columns_dl: Tensor) -> Steps[Tensor]:
    """Return orthonormal columns with the same span, (d, l); the lengths of the given columns may differ widely."""
    basis_dl, _ = yield Orthonormal(columns_dl / torch.linalg.vector_norm(columns_dl, dim=0).clamp_min(TINY))
    return basis_dl


def _ritz_pairs(matrix_dd: Tensor, basis_dl: Tensor) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """Return the Ritz vectors in the span of a basis (d, l), their images (d, l) and Ritz values (l,), descending."""
    image_dl = matrix_dd @ basis_dl
    core_ll = solver_copy(basis_dl.T @ image_dl)
    values_l, vectors_ll = yield Eigh((core_ll + core_ll.T) / 2)
    vectors_ll = vectors_ll.flip(1).to(image_dl)
    return basis_dl @ vectors_ll, image_dl @ vectors_ll, values_l.flip(0).to(image_dl)


def _filtered(matrix_dd: Tensor, basis_dl: Tensor, image_dl: Tensor, values_l: Tensor) -> Tensor:
    """Apply the Chebyshev polynomial that is small on [0, smallest Ritz value] and grows fastest beyond it, (d, l).

    The polynomial is scaled to 1 at the largest Ritz value, so that it cannot overflow. If the smallest Ritz value is
    zero, the columns already span all that the matrix does not map to zero, and only the matrix is applied.
    """
    half = values_l[-1] / 2
    first = half / (values_l[0] - half)
    scale = first
    before_dl, now_dl = basis_dl, (image_dl - half * basis_dl) * (first / half)
    for _ in range(DEGREE - 1):
        following = 1 / (2 / first - scale)
        shifted_dl = matrix_dd @ now_dl - half * now_dl
        before_dl, now_dl = now_dl, shifted_dl * (2 * following / half) - before_dl * (scale * following)
        scale = following
    return torch.where(half > 0, now_dl, image_dl)


def _all_eigenpairs(matrix_dd: Tensor) -> Steps[tuple[Tensor, Tensor]]:
    values_d, vectors_dd = yield Eigh(matrix_dd)
    return vectors_dd.flip(1), values_d.flip(0).clamp_min(0.0)
