"""What a sketch misses, estimated from its probes, and whether rounding would hide directions from it.

Shapes: d features, k components, s probes, p eigenpairs. Functions take tensors with more dimensions in front, too.

A few random columns Ω never change and take no part in the approximation, but W = S Ω is accumulated over all rows. For
an eigenpair (v, λ) of the approximation, vᵀW - λ vᵀΩ has mean square ‖S v - λ v‖², the squared residual of the pair in
the true matrix.

Reference: Tropp, Yurtsever, Udell and Cevher (2019) for estimates of errors from random probes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.pca.eigen import missed_variance
from evatune.pca.products import BFLOAT16_ROUNDING
from evatune.pca.subspace import solver_copy

RESIDUAL_NOISE = 1e-2
"""Largest residual, relative to the k-th eigenvalue, that rounding to bfloat16 may cause by estimate (`is_massive`).

The missed variance is about its square: measured on 4,096 features with variances 1/i, 3e-7 (`benchmarks/scaling.py`).
"""

MASSIVE_RATIO = 1e5
"""If the largest eigenvalue of a sketch exceeds its smallest by this factor, bfloat16 errors hide the smallest."""

HALF_MARGIN = 10
"""The first half of the components may miss only the tolerance divided by this. Chosen, not measured: with rho 2, a
target uses on average half of the components that are kept."""


def missed_by(
    vectors_dk: Tensor, values_k: Tensor, beyond: Tensor, probes_ds: Tensor, images_ds: Tensor
) -> tuple[Tensor]:
    """Estimate what each of the first k components misses, (k,), in the units of the eigenvalues.

    By second-order perturbation, an eigenpair (v, λ) with residual ρ misses ρ² / (λ - μ) to directions of smaller
    eigenvalues μ, and at most ρ. Outside of the sketch, μ is at most about its last eigenvalue.

    Args:
        vectors_dk: eigenvectors, (d, k).
        values_k: their eigenvalues, (k,).
        beyond: the last eigenvalue of the sketch, (1,).
        probes_ds: Ω, (d, s).
        images_ds: W, (d, s).
    """
    vectors_dk, values_k, beyond, probes_ds, images_ds = map(
        solver_copy, (vectors_dk, values_k, beyond, probes_ds, images_ds)
    )
    residuals_ks = vectors_dk.mT @ images_ds - values_k[..., None] * (vectors_dk.mT @ probes_ds)
    residuals_k = residuals_ks.square().mean(dim=-1).sqrt()
    return (missed_variance(residuals_k, values_k, beyond),)


def worst_share(missed_k: Tensor, values_k: Tensor) -> Tensor:
    """Return the share that k components miss, or ten times (`HALF_MARGIN`) that of the first half if this is more."""
    n_half = (missed_k.shape[-1] + 1) // 2
    share = missed_k.sum(dim=-1) / values_k.sum(dim=-1)
    share_of_half = missed_k[..., :n_half].sum(dim=-1) / values_k[..., :n_half].sum(dim=-1)
    return torch.maximum(share, HALF_MARGIN * share_of_half)


def is_massive(values_p: Tensor, *, n_components: int, n_features: int, width: int) -> Tensor:
    """Tell whether a few directions are so large that bfloat16 errors would hide the others.

    Each entry of a probe's product is rounded by a relative 2⁻⁹, and is of the order of λ₁ / √d. If the rows so far
    span fewer directions than there are columns, the other columns would see nothing but these errors.
    """
    n_pairs = values_p.shape[-1]
    if n_pairs < width:
        return values_p.new_ones(values_p.shape[:-1])
    smallest = values_p[..., min(n_components, n_pairs) - 1]
    noise = BFLOAT16_ROUNDING * values_p[..., 0] / n_features**0.5
    is_hidden = (noise > RESIDUAL_NOISE * smallest) | (values_p[..., 0] > MASSIVE_RATIO * values_p[..., -1])
    return is_hidden.to(values_p)


def judged(
    values_p: Tensor, missed_k: Tensor | None = None, *, n_components: int, n_features: int, width: int
) -> tuple[Tensor]:
    """Return `worst_share`, or zero if it is unknown what the components miss, and `is_massive`, (2,)."""
    massive = is_massive(values_p, n_components=n_components, n_features=n_features, width=width)
    if missed_k is None:
        return (torch.stack([torch.zeros_like(massive), massive], dim=-1),)
    share = worst_share(missed_k, values_p[..., : missed_k.shape[-1]].to(missed_k.device))
    return (torch.stack([share, massive.to(share)], dim=-1),)
