"""Small linear algebra on subspaces: signs, completion, low-rank sums and cosines.

Shapes: d features, k components, l sketch columns. Components are rows (k, d), bases are columns (d, l).
Everything here works on matrices with few columns and is called at refreshes and checks, never once a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.pca.threads import one_thread

ZERO = 1e-13
"""Eigenvalues of a Gram matrix in float64 below this share of the largest are rounding errors: some 500 times 2⁻⁵²."""

TELLS_APART = 1e-7
"""Differences between columns in float32 below this share of their length are rounding errors: 2⁻²³."""


def solver_copy(matrix: Tensor) -> Tensor:
    """Return a float64 copy for a factorization, on the CPU where the device has no float64; callers write into it."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).to(torch.float64, copy=True)


def own(matrix: Tensor) -> Tensor:
    """Return a matrix that is no part of a stack, whose memory would be kept as long as any part of it."""
    return matrix.clone() if matrix._is_view() else matrix


def row_times(row_d: Tensor, matrix_dm: Tensor) -> Tensor:
    """Return the product of a row with a matrix, (m,), or those of a stack."""
    return row_d @ matrix_dm if row_d.ndim == 1 else (row_d[..., None, :] @ matrix_dm)[..., 0, :]


def plus_outer(matrix_dm: Tensor, left_d: Tensor, right_m: Tensor, *, weight: float) -> Tensor:
    """Return a matrix plus the weighted outer product of two vectors, (d, m), or those of a stack."""
    if matrix_dm.ndim == 2:
        return matrix_dm.addr(left_d, right_m, alpha=weight)
    return torch.baddbmm(matrix_dm, left_d[..., None], right_m[..., None, :], alpha=weight)


def orthonormal(columns_dl: Tensor) -> Tensor:
    """Return orthonormal columns with the same span, (d, l), by a QR decomposition on one thread. Cost O(d l²)."""
    on_solver_dl = columns_dl.cpu() if columns_dl.device.type == "mps" else columns_dl
    with one_thread():
        return torch.linalg.qr(on_solver_dl).Q.to(columns_dl)


def told_apart(columns_dl: Tensor) -> Tensor:
    """Return columns with the same span, orthonormal as far as float32 tells the given ones apart, (d, l).

    By a Cholesky factor of their Gram matrix in float64 (CholeskyQR): products and one small factorization, where a QR
    decomposition of a tall matrix would be many small steps, and nothing that an accelerator must wait for. Directions
    along which the given columns have less than `TELLS_APART` of their length become shorter than one, or rounding
    errors. Cost O(d l²).
    """
    wide_dl = solver_copy(columns_dl)
    gram_ll = wide_dl.T @ wide_dl
    gram_ll.diagonal().add_(gram_ll.diagonal().sum() * TELLS_APART**2 + torch.finfo(gram_ll.dtype).tiny)
    lower_ll, _ = torch.linalg.cholesky_ex(gram_ll)
    return torch.linalg.solve_triangular(lower_ll, wide_dl.T, upper=False).T.to(columns_dl)


def fix_signs(components_kd: Tensor) -> Tensor:
    """Flip each component so that its largest entry in magnitude is positive; equal data give equal signs.

    Args:
        components_kd: components in rows, (k, d), or those of a stack.

    Returns:
        A new tensor, (k, d).
    """
    largest_k1 = components_kd.abs().argmax(dim=-1, keepdim=True)
    signs_k1 = torch.sign(components_kd.gather(-1, largest_k1))
    return components_kd * torch.where(signs_k1 == 0, torch.ones_like(signs_k1), signs_k1)


def signed_components(basis_dk: Tensor, values_k: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return components (k, d) and singular values (k,) from eigenvectors in columns and eigenvalues, or of a stack."""
    return fix_signs(basis_dk.mT).contiguous().to(dtype), values_k.sqrt().to(dtype)


def complete_basis(basis_dl: Tensor, n_columns: int, *, seed: int) -> Tensor:
    """Add random orthonormal columns to an orthonormal basis until it has `n_columns`.

    A test matrix must keep its width even if the data so far span fewer directions; otherwise it could never find
    directions that later data add.

    Args:
        basis_dl: orthonormal columns, (d, l) with l <= n_columns <= d.
        n_columns: the width wanted.
        seed: of the random columns.

    Returns:
        Orthonormal columns, (d, n_columns); the first l are `basis_dl`.
    """
    n_features, n_present = basis_dl.shape
    if n_present >= n_columns:
        return basis_dl[:, :n_columns]
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(n_features, n_columns - n_present, generator=generator, dtype=torch.float64, device="cpu")
    random = random.to(basis_dl, non_blocking=True)
    for _ in range(2):  # twice is enough (Parlett)
        random = random - basis_dl @ (basis_dl.T @ random)
        random = orthonormal(random)
    return torch.cat([basis_dl, random], dim=1)


def eigenpairs_of_factor(factor_dm: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenpairs of F Fᵀ through the small Gram matrix FᵀF.

    Args:
        factor_dm: the factor F, (d, m) in float64 with few columns.

    Returns:
        Orthonormal eigenvectors in columns (d, p) and eigenvalues (p,), descending. p <= min(m, d), since
        eigenvalues that are zero up to rounding are left out. Cost O(d m² + m³).
    """
    values_m, vectors_mm = torch.linalg.eigh(factor_dm.T @ factor_dm)
    values_m, vectors_mm = values_m.flip(0), vectors_mm.flip(1)
    keep = values_m > values_m[:1].clamp_min(0.0) * ZERO
    keep[factor_dm.shape[0] :] = False
    values_p, vectors_mp = values_m[keep], vectors_mm[:, keep]
    return (factor_dm @ vectors_mp) / values_p.sqrt(), values_p


def component_cosines(new_kd: Tensor, old_kd: Tensor) -> Tensor:
    """Absolute cosine of each component with itself one update before (Section 3.2 of the paper).

    Args:
        new_kd: components now, (k, d), orthonormal.
        old_kd: components before, (k, d), orthonormal.

    Returns:
        Cosines between 0 and 1, (k,). The sign of a component carries no information, so it is ignored.
    """
    return (new_kd * old_kd).sum(dim=1).abs()
