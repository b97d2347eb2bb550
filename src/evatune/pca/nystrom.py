"""Leading eigenpairs of a symmetric positive matrix from a thin sketch of it.

Shapes: d features, l columns of the sketch, m of them that see any variance, r columns of a factor, p eigenpairs.

References: Gittens and Mahoney (2013) and Tropp, Yurtsever, Udell and Cevher (2017) for the Nyström approximation;
Demmel and Veselić (1992) for why a scaled matrix tells its small eigenvalues from its large ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.pca.subspace import ZERO, solver_copy
from evatune.pca.threads import one_thread

SPREAD = 1e6
"""Where the columns of a sketch see variances that are further apart than this, products of it are made in float64."""


def nystrom_eigenpairs(test_dl: Tensor, sketch_dl: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenpairs of the Nyström approximation Y (QᵀY)⁺ Yᵀ of a matrix S that is known through Y = S Q.

    Products of tall matrices are made in the dtype of the sketch, which is as rounded as they will be, and on as many
    threads as torch has now; the small matrices are factorized in float64 on one. That takes a factor whose columns
    fall in size as the eigenvalues do: float32 then tells small eigenvalues from large ones.

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
    # A column that sees no variance holds rounding errors, which the formula would divide by themselves.
    noise_l = solver_copy(torch.linalg.vector_norm(sketch_dl, dim=0)) * (1e-3 / n_features**0.5)
    alive_l = energy_l > torch.maximum(noise_l, energy_l.sum() * rounding**2)
    order_l = energy_l.argsort(descending=True, stable=True)
    order_m = order_l[alive_l[order_l]]
    if not len(order_m):
        return test_dl[:, :0], sketch_dl[0, :0]
    if energy_l[order_m[0]] > SPREAD * energy_l[order_m[-1]]:
        test_dl, wide_dl = solver_copy(test_dl), solver_copy(sketch_dl)
    else:
        wide_dl = sketch_dl
    # Massive activations make the core span many orders of magnitude. With a unit diagonal, the cut-off is relative
    # to each direction and not to the largest one.
    core_mm = solver_copy(test_dl.T @ wide_dl)[order_m][:, order_m]
    scale_m = core_mm.diagonal().rsqrt()
    core_mm = (core_mm + core_mm.T) / 2 * scale_m * scale_m[:, None]
    with one_thread():
        root_mr = _inverse_root(core_mm, cutoff=width * rounding)
    weights_lr = root_mr.new_zeros(width, root_mr.shape[1])
    weights_lr[order_m] = scale_m[:, None] * root_mr
    factor_dr = wide_dl @ weights_lr.to(wide_dl)
    gram_rr = solver_copy(factor_dr.T @ factor_dr)
    with one_thread():
        values_r, vectors_rr = torch.linalg.eigh(gram_rr)
    values_r, vectors_rr = values_r.flip(0), vectors_rr.flip(1)
    keep_r = values_r > values_r[0].clamp_min(0.0) * ZERO
    values_p = values_r[keep_r]
    vectors_dp = factor_dr @ (vectors_rr[:, keep_r] / values_p.sqrt()).to(factor_dr)
    return vectors_dp.to(sketch_dl), values_p.to(sketch_dl)


def _inverse_root(core_mm: Tensor, *, cutoff: float) -> Tensor:
    """Return R, (m, r), with R Rᵀ = C⁺ and column j made of the first m - r + j of the columns it will be applied to.

    Args:
        core_mm: C, with a unit diagonal, in float64.
        cutoff: eigenvalues below this share of the largest one count as zero.
    """
    lower_mm, failed = torch.linalg.cholesky_ex(core_mm)
    if not failed and lower_mm.diagonal().square().min() > cutoff:
        return torch.linalg.solve_triangular(lower_mm.T, torch.eye(len(core_mm)).to(core_mm), upper=True)
    values_m, vectors_mm = torch.linalg.eigh(core_mm)
    keep_m = values_m > values_m[-1] * cutoff
    root_mr = vectors_mm[:, keep_m] / values_m[keep_m].sqrt()
    # Any rotation of these columns would do. This is the one that makes them triangular, like those from Cholesky.
    return torch.linalg.qr(root_mr.flip(0).T, mode="r").R.T.flip(0, 1)
