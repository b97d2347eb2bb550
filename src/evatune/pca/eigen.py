"""Leading eigenpairs of a symmetric positive matrix: from a thin sketch of it, and by iteration on the matrix itself.

Shapes: d features, l sketch columns, p <= l eigenpairs.

References: Gittens and Mahoney (2013) and Tropp, Yurtsever, Udell and Cevher (2017) for the Nyström approximation;
Saad (2011), Numerical Methods for Large Eigenvalue Problems, chapter 5, for subspace iteration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.pca.subspace import eigenpairs_of_factor, solver_copy

FULL_UP_TO = 256
"""Width up to which a full eigendecomposition is quicker than iterating."""

OVERSAMPLING = 32
"""How many columns more than wanted pairs are iterated: the pairs converge by λ of the first left out over theirs."""

MAX_STEPS = 40
"""Steps after which a matrix whose spectrum hardly falls is factorized in full."""


COLD_STEPS = 3
"""How many steps more a rough answer takes from random columns."""


def nystrom_eigenpairs(test_dl: Tensor, sketch_dl: Tensor, *, rounding: float, floor: float) -> tuple[Tensor, Tensor]:
    """Return eigenpairs of the Nyström approximation Y (QᵀY)⁺ Yᵀ of a matrix S that is known through Y = S Q.

    Args:
        test_dl: test matrix Q, (d, l) in float64.
        sketch_dl: sketch Y, (d, l) in float64.
        rounding: unit roundoff of the sums that made the sketch.
        floor: share of the trace below which a column's energy qᵀSq may be nothing but rounding errors.

    Returns:
        Orthonormal eigenvectors in columns (d, p) and eigenvalues (p,), descending; p <= l leaves out directions in
        which S is zero. Cost O(d l² + l³).
    """
    n_features, width = test_dl.shape
    core_ll = test_dl.T @ sketch_dl
    core_ll = (core_ll + core_ll.T) / 2
    # A column that sees no variance holds rounding errors, which the formula would divide by themselves.
    energy_l = core_ll.diagonal()
    noise_l = torch.linalg.vector_norm(sketch_dl, dim=0) * (1e-3 / n_features**0.5)
    alive_l = energy_l > torch.maximum(noise_l, energy_l.sum() * floor)
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


def leading_eigenpairs(
    matrix_dd: Tensor,
    n_pairs: int,
    *,
    tolerance: float,
    near_dl: Tensor | None = None,
    n_steps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the leading eigenpairs of a symmetric positive matrix, or all of them where that is quicker.

    Subspace iteration with a Nyström step each time, until every wanted pair has a residual ‖S v - λ v‖ of at most
    `tolerance` λ. The angle to an eigenvector is at most the residual over the gap to the next eigenvalue, and the
    variance that the pair misses is of the order of the residual's square.

    Args:
        matrix_dd: the matrix, (d, d).
        n_pairs: how many pairs are wanted.
        tolerance: of the residuals, relative to the eigenvalues.
        near_dl: columns that nearly span them, from a similar matrix.
        n_steps: take so many steps from `near_dl`, whatever the residual, and some more where it is not given.

    Returns:
        Orthonormal eigenvectors in columns (d, p) and eigenvalues (p,), descending, p >= n_pairs where the matrix has
        so many that are not zero. Cost O(d² p) a step, or O(d³).
    """
    n_features = matrix_dd.shape[0]
    width = n_pairs + OVERSAMPLING
    if n_features <= FULL_UP_TO or 4 * width > n_features:
        return _all_eigenpairs(matrix_dd)
    rounding = torch.finfo(matrix_dd.dtype).eps
    if near_dl is None or near_dl.shape[1] < n_pairs:
        generator = torch.Generator().manual_seed(n_features)
        near_dl = torch.randn(n_features, width, generator=generator).to(matrix_dd)
        n_steps = None if n_steps is None else n_steps + COLD_STEPS
    values_p: Tensor | None = None
    for step in range(MAX_STEPS if n_steps is None else n_steps):
        image_dl = solver_copy(matrix_dd @ near_dl.to(matrix_dd))
        test_dl = solver_copy(near_dl.to(matrix_dd))
        if n_steps is None and values_p is not None:
            residual_k = torch.linalg.vector_norm((image_dl - test_dl * values_p)[:, :n_pairs], dim=0)
            if bool((residual_k <= tolerance * values_p[:n_pairs]).all()):
                return near_dl, values_p
        # A product with the matrix itself is wrong by a relative rounding of its largest eigenvalue in all columns.
        near_dl, values_p = nystrom_eigenpairs(test_dl, image_dl, rounding=rounding, floor=10 * rounding)
        if step == 0 and near_dl.shape[1] < n_pairs:  # the matrix has no more
            return near_dl, values_p
    if n_steps is None or values_p is None:
        return _all_eigenpairs(matrix_dd)
    return near_dl, values_p


def _all_eigenpairs(matrix_dd: Tensor) -> tuple[Tensor, Tensor]:
    on_cpu = matrix_dd.cpu() if matrix_dd.device.type == "mps" else matrix_dd
    values_d, vectors_dd = torch.linalg.eigh(on_cpu)
    return vectors_dd.flip(1), values_d.flip(0).clamp_min(0.0)
