"""The curvature of the loss at one point: the ends of the spectrum of its Hessian over chosen parameters.

Where an adapter starts with B = 0, the loss does not depend on A, so the block of A in the Hessian is zero, and the
blocks between A and B are not: there are eigenvalues of both signs. Power iteration stalls where two of opposite sign
are alike. The Lanczos method finds both ends.

Letters: n parameters, k products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from evatune.errors import EvaError

Loss = Callable[[nn.Module, Any], Tensor]

TINY = 1e-6
"""What is left of a product is rounding error if it is shorter than this part of the product; then all is found."""


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """The ends of a spectrum."""

    largest: float
    """The largest eigenvalue."""
    smallest: float
    """The smallest one; it is negative where the loss falls off in some direction."""
    residual: float
    """An eigenvalue is within this distance of the one of the two that is larger in magnitude."""

    @property
    def sharpness(self) -> float:
        """The eigenvalue of largest magnitude, without its sign."""
        return max(abs(self.largest), abs(self.smallest))


def curvature(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    scales: Mapping[str, float],
    n_products: int = 10,
    seed: int = 0,
) -> Curvature:
    """Return the ends of the spectrum of the loss's Hessian, by the Lanczos method.

    Args:
        model: in evaluation mode, since dropout would make it another loss; it is left as it was.
        batches: the loss is the mean of theirs.
        loss: of a model and a batch.
        scales: the parameters by name, each with the unit that it is measured in: the Hessian is that of the loss as a
            function of parameter / unit. For an optimizer with several learning rates, these are the units in which
            it has one.
        n_products: products of the Hessian with a vector.
        seed: of the first direction.

    Raises:
        EvaError: no batch, no product, no parameter or one that is unknown or frozen, or a loss that is not finite.

    Cost: one forward and backward pass, and `n_products` backward passes through both; k n numbers, and the activations
    of all batches at once.
    """
    if n_products < 1:
        raise EvaError(f"n_products is {n_products}, but must be at least 1.")
    parameters = _parameters(model, scales)
    units_n = _joined([torch.full_like(p, scale) for p, scale in zip(parameters, scales.values(), strict=True)])
    first_n = torch.randn(len(units_n), generator=torch.Generator().manual_seed(seed)).to(units_n)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        gradients = _gradients(model, batches, loss, parameters)

        def product(vector_n: Tensor) -> Tensor:
            return units_n * _times_hessian(gradients, parameters, units_n * vector_n)

        values, residuals = lanczos(product, first_n, n_products=n_products)
    sharpest = int(values.abs().argmax())
    return Curvature(largest=float(values[-1]), smallest=float(values[0]), residual=float(residuals[sharpest]))


def lanczos(product: Callable[[Tensor], Tensor], first_n: Tensor, *, n_products: int) -> tuple[Tensor, Tensor]:
    """Return approximate eigenvalues of a symmetric matrix, ascending, and how far each may be from one.

    Args:
        product: multiplies the matrix with a vector (n,).
        first_n: the first direction; eigenvectors that are orthogonal to it are not found.
        n_products: how many products; fewer if the eigenvalues are exact before.

    Raises:
        EvaError: a product is not finite.

    Cost: the products, and k² n operations to keep the directions orthogonal.
    """
    basis = [first_n / first_n.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image_n = product(basis[-1])
        length = float(image_n.norm())
        if not math.isfinite(length):
            raise EvaError(f"product {len(basis)} with the Hessian is not finite, so it has no eigenvalues.")
        diagonal.append(float(image_n @ basis[-1]))
        directions_kn = torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors, which would make copies of eigenvalues
            image_n = image_n - directions_kn.T @ (directions_kn @ image_n)
        beside.append(float(image_n.norm()))
        if len(basis) == min(n_products, len(first_n)) or beside[-1] <= TINY * length:
            break
        basis.append(image_n / beside[-1])
    small_kk = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if len(beside) > 1:
        off = torch.diag(torch.tensor(beside[:-1], dtype=torch.float64), 1)
        small_kk += off + off.T
    values_k, vectors_kk = torch.linalg.eigh(small_kk)
    return values_k, beside[-1] * vectors_kk[-1].abs()


def _parameters(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    known = dict(model.named_parameters())
    found = []
    for name in names:
        if name not in known:
            raise EvaError(f"the model has no parameter {name!r}.")
        if not known[name].requires_grad:
            raise EvaError(f"parameter {name!r} is frozen, so training does not see its curvature; leave it out.")
        found.append(known[name])
    if not found:
        raise EvaError("no parameter is named, and a curvature needs one at least.")
    return found


def _gradients(
    model: nn.Module, batches: Iterable[Any], loss: Loss, parameters: Sequence[nn.Parameter]
) -> Sequence[Tensor]:
    """Return the gradients of the mean loss, with what is needed to differentiate them."""
    losses = []
    for number, batch in enumerate(batches, start=1):
        losses.append(loss(model, batch))
        if not math.isfinite(value := losses[-1].item()):
            raise EvaError(f"the loss of batch {number} is {value:g}, so it has no curvature.")
    if not losses:
        raise EvaError("a curvature needs one batch at least, and there is none.")
    return torch.autograd.grad(torch.stack(losses).mean(), parameters, create_graph=True, materialize_grads=True)


def _times_hessian(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter], direction_n: Tensor) -> Tensor:
    """Return the derivative of the gradients along a direction, by differentiating their product with it."""
    parts = direction_n.split([parameter.numel() for parameter in parameters])
    pairs = [(g.flatten(), part) for g, part in zip(gradients, parts, strict=True) if g.requires_grad]
    if not pairs:  # the loss is linear
        return torch.zeros_like(direction_n)
    inner = torch.stack([gradient @ part for gradient, part in pairs]).sum()
    return _joined(torch.autograd.grad(inner, parameters, retain_graph=True, materialize_grads=True))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts])
