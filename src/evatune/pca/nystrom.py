"""Leading eigenpairs of a symmetric positive matrix from a thin sketch of it.

Shapes: d features, l columns of the sketch, m of them that see any variance, r columns of a factor, p eigenpairs.

References: Gittens and Mahoney (2013) and Tropp, Yurtsever, Udell and Cevher (2017) for the Nyström approximation;
Demmel and Veselić (1992) for why a scaled matrix tells its small eigenvalues from its large ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.pca.subspace import ZERO, solver_copy
from evatune.pca.together import Eigh, Host, InverseRoot, Orthonormal, Steps

SPREAD = 1e6
"""Products of a sketch are made in float64 if the variances along its columns differ by more than this factor."""


COLUMN_NOISE = 1e-3
"""A column q sees no variance if qᵀS q is below this share of ‖S q‖ / √d, the value of a random column: S q then holds
rounding errors only. Chosen, not measured."""


def nystrom_eigenpairs(test_dl: Tensor, sketch_dl: Tensor) -> Steps[tuple[Tensor, Tensor]]:
    """Return eigenpairs of the Nyström approximation Y (QᵀY)⁺ Yᵀ of a matrix S that is known through Y = S Q.

    Products of tall matrices are made in the dtype of the sketch: more precision would not help, since the sketch is
    rounded to it already. The small matrices are factorized in float64. The columns of the factor shrink as the
    eigenvalues do, so float32 is precise enough for the small eigenvalues too.

    Args:
        test_dl: test matrix Q, (d, l).
        sketch_dl: sketch Y, (d, l).

    Returns:
        Orthonormal eigenvectors in columns (d, p) and eigenvalues (p,), descending; p <= l leaves out directions in
        which S is zero. Cost O(d l² + l³).
    """
    n_features, width = test_dl.shape
    rounding = torch.finfo(sketch_dl.dtype).eps
    energy_l = solver_copy((test_dl * sketch_dl).sum(dim=0))
    # A column that sees no variance holds rounding errors; the formula would divide rounding errors by rounding errors.
    noise_l = solver_copy(torch.linalg.vector_norm(sketch_dl, dim=0)) * (COLUMN_NOISE / n_features**0.5)
    alive_l = energy_l > torch.maximum(noise_l, energy_l.sum() * rounding**2)
    alive_energy_l = torch.where(alive_l, energy_l, -torch.inf)
    order_l = alive_energy_l.argsort(descending=True, stable=True)
    largest, least = alive_energy_l.max(), torch.where(alive_l, energy_l, torch.inf).min()
    n_alive, is_spread = yield Host(torch.stack([alive_l.sum().to(least), (largest > SPREAD * least).to(least)]))
    if not n_alive:
        return test_dl[:, :0], sketch_dl[0, :0]
    order_m = order_l[: int(n_alive)]
    wide_dl = sketch_dl
    if is_spread:
        test_dl, wide_dl = solver_copy(test_dl), solver_copy(sketch_dl)
    # Massive activations make the core span many orders of magnitude. With a unit diagonal, the cut-off is relative
    # to each direction and not to the largest one.
    core_mm = solver_copy(test_dl.T @ wide_dl)[order_m][:, order_m]
    scale_m = core_mm.diagonal().rsqrt()
    core_mm = (core_mm + core_mm.T) / 2 * scale_m * scale_m[:, None]
    root_mr = yield from _inverse_root(core_mm, cutoff=width * rounding)
    weights_lr = root_mr.new_zeros(width, root_mr.shape[1])
    weights_lr[order_m] = scale_m[:, None] * root_mr
    factor_dr = wide_dl @ weights_lr.to(wide_dl)
    values_r, vectors_rr = yield Eigh(solver_copy(factor_dr.T @ factor_dr))
    values_r, vectors_rr = values_r.flip(0), vectors_rr.flip(1)
    (n_pairs,) = yield Host((values_r > values_r[0].clamp_min(0.0) * ZERO).sum())
    values_p = values_r[: int(n_pairs)]
    vectors_dp = factor_dr @ (vectors_rr[:, : int(n_pairs)] / values_p.sqrt()).to(factor_dr)
    return vectors_dp.to(sketch_dl), values_p.to(sketch_dl)


def _inverse_root(core_mm: Tensor, *, cutoff: float) -> Steps[Tensor]:
    """Return R, (m, r), with R Rᵀ = C⁺, where column j has nonzero entries in its first m - r + j rows only.

    Args:
        core_mm: C, with a unit diagonal, in float64.
        cutoff: eigenvalues below this share of the largest one count as zero.
    """
    root_mm, pivot = yield InverseRoot(core_mm)
    (is_definite,) = yield Host(pivot > cutoff)
    if is_definite:
        return root_mm
    values_m, vectors_mm = yield Eigh(core_mm)
    (n_kept,) = yield Host((values_m > values_m[-1] * cutoff).sum())
    root_mr = vectors_mm[:, -int(n_kept) :] / values_m[-int(n_kept) :].sqrt()
    # Any rotation of these columns would do. This is the one that makes them triangular, like those from Cholesky.
    _, triangle_rm = yield Orthonormal(root_mr.flip(0).T)
    return triangle_rm.T.flip(0, 1)
