"""Leading eigenpairs of a symmetric positive matrix from a thin sketch of it.

Shapes: d features, l columns of the sketch, m of them that see any variance, r columns of a factor, p eigenpairs.
Functions for `batched` take tensors with more dimensions in front.

References: Gittens and Mahoney (2013) and Tropp, Yurtsever, Udell and Cevher (2017) for the Nyström approximation;
Demmel and Veselić (1992) for why a scaled matrix tells its small eigenvalues from its large ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.pca.backend import Pairs
from evatune.pca.subspace import ZERO, solver_copy
from evatune.pca.together import Eigh, Host, InverseRoot, Orthonormal, Steps, batched

SPREAD = 1e6
"""Products of a sketch are made in float64 if the variances along its columns differ by more than this factor."""


COLUMN_NOISE = 1e-3
"""A column q sees no variance if qᵀS q is below this share of ‖S q‖ / √d, the value of a random column: S q then holds
rounding errors only. Chosen, not measured."""


def nystrom_eigenpairs(test_dl: Tensor, sketch_dl: Tensor) -> Steps[Pairs]:
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
    order_l, seen = yield batched(_seen, test_dl, sketch_dl)
    n_alive, is_spread = yield Host(seen)
    if not n_alive:
        return test_dl[:, :0], sketch_dl[0, :0]
    order_m = order_l[: int(n_alive)]
    wide_dl = sketch_dl
    if is_spread:
        test_dl, wide_dl = solver_copy(test_dl), solver_copy(sketch_dl)
    core_mm, scale_m = yield batched(_core, test_dl, wide_dl, order_m)
    root_mr = yield from _inverse_root(core_mm, cutoff=test_dl.shape[1] * torch.finfo(sketch_dl.dtype).eps)
    factor_dr, gram_rr = yield batched(_factor, wide_dl, root_mr, scale_m, order_m)
    values_r, vectors_rr = yield Eigh(gram_rr)
    values_r, vectors_rr, n_positive = yield batched(_descending, values_r, vectors_rr)
    (n_pairs,) = yield Host(n_positive)
    values_p, vectors_rp = values_r[: int(n_pairs)], vectors_rr[:, : int(n_pairs)]
    pairs: Pairs = yield batched(_pairs, factor_dr, vectors_rp, values_p, dtype=sketch_dl.dtype)
    return pairs


def _seen(test_dl: Tensor, sketch_dl: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of the columns by falling variance, (l,), and (2,): how many see any, and whether it is spread.

    A column that sees no variance holds rounding errors; the formula would divide rounding errors by rounding errors.
    """
    rounding, n_features = torch.finfo(sketch_dl.dtype).eps, test_dl.shape[-2]
    energy_l = solver_copy((test_dl * sketch_dl).sum(dim=-2))
    noise_l = solver_copy(torch.linalg.vector_norm(sketch_dl, dim=-2)) * (COLUMN_NOISE / n_features**0.5)
    alive_l = energy_l > torch.maximum(noise_l, energy_l.sum(dim=-1, keepdim=True) * rounding**2)
    alive_energy_l = torch.where(alive_l, energy_l, -torch.inf)
    order_l = alive_energy_l.argsort(dim=-1, descending=True, stable=True)
    largest, least = alive_energy_l.amax(dim=-1), torch.where(alive_l, energy_l, torch.inf).amin(dim=-1)
    return order_l, torch.stack([alive_l.sum(dim=-1).to(least), (largest > SPREAD * least).to(least)], dim=-1)


def _core(test_dl: Tensor, sketch_dl: Tensor, order_m: Tensor) -> tuple[Tensor, Tensor]:
    """Return QᵀY of the columns that see any variance, scaled to a unit diagonal, (m, m), and the scale, (m,).

    Massive activations make it span many orders of magnitude. With a unit diagonal, the cut-off is relative to each
    direction and not to the largest one.
    """
    core_ll = solver_copy(test_dl.mT @ sketch_dl)
    core_mm = core_ll.take_along_dim(order_m[..., None], -2).take_along_dim(order_m[..., None, :], -1)
    scale_m = core_mm.diagonal(dim1=-2, dim2=-1).rsqrt()
    return (core_mm + core_mm.mT) / 2 * scale_m[..., None, :] * scale_m[..., None], scale_m


def _factor(sketch_dl: Tensor, root_mr: Tensor, scale_m: Tensor, order_m: Tensor) -> tuple[Tensor, Tensor]:
    """Return F, (d, r), with F Fᵀ the Nyström approximation, and FᵀF, (r, r)."""
    weights_lr = root_mr.new_zeros(*root_mr.shape[:-2], sketch_dl.shape[-1], root_mr.shape[-1])
    weights_lr.scatter_(-2, order_m[..., None].expand_as(root_mr), scale_m[..., None] * root_mr)
    factor_dr = sketch_dl @ weights_lr.to(sketch_dl)
    return factor_dr, solver_copy(factor_dr.mT @ factor_dr)


def _descending(values_r: Tensor, vectors_rr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues and eigenvectors in falling order, and how many eigenvalues are above rounding errors."""
    values_r = values_r.flip(-1)
    n_positive = (values_r > values_r[..., :1].clamp_min(0.0) * ZERO).sum(dim=-1)
    return values_r, vectors_rr.flip(-1), n_positive


def _pairs(factor_dr: Tensor, vectors_rp: Tensor, values_p: Tensor, *, dtype: torch.dtype) -> Pairs:
    """Return the eigenpairs of F Fᵀ from those of FᵀF."""
    vectors_dp = factor_dr @ (vectors_rp / values_p.sqrt()[..., None, :]).to(factor_dr)
    return vectors_dp.to(dtype), values_p.to(vectors_dp.device, dtype)


def _inverse_root(core_mm: Tensor, *, cutoff: float) -> Steps[Tensor]:
    """Return R, (m, r), with R Rᵀ = C⁺, where column j has nonzero entries in its first m - r + j rows only.

    Args:
        core_mm: C, with a unit diagonal, in float64.
        cutoff: eigenvalues below this share of the largest one count as zero.
    """
    root_mm, least = yield InverseRoot(core_mm)
    (pivot,) = yield Host(least)
    if pivot > cutoff:
        return root_mm
    values_m, vectors_mm = yield Eigh(core_mm)
    (n_kept,) = yield Host((values_m > values_m[-1] * cutoff).sum())
    root_mr = vectors_mm[:, -int(n_kept) :] / values_m[-int(n_kept) :].sqrt()
    # Any rotation of these columns would do. This is the one that makes them triangular, like those from Cholesky.
    _, triangle_rm = yield Orthonormal(root_mr.flip(0).T)
    return triangle_rm.T.flip(0, 1)
