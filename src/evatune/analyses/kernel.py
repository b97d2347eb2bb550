"""The neural tangent kernel of a small model, and how much of it an adapter's start keeps.

Near the start, training W moves the loss of example j by the gradient of example i along <G_i, G_j>, the kernel K of
their gradients. An adapter with B = 0 trains B alone at first, whose gradient is G_i Aᵀ, so its kernel is
<G_i Aᵀ, G_j Aᵀ>: what A projects out of the input, it cannot learn. A start suits the task if the leading eigenvectors
of both kernels span the same.

Letters: n examples, m outputs, d inputs, k rows of A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evatune.analyses.subspaces import overlap
from evatune.errors import EvaError

Loss = Callable[[nn.Module, Any], Tensor]


def gradient_kernels(
    model: nn.Module, examples: Iterable[Any], loss: Loss, *, starts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the kernel of the full weights, under the name "full", and that of each start.

    Args:
        model: its weights stay as they are; gradients are computed for the named weights only.
        examples: batches of one example each.
        loss: of a model and an example.
        starts: for each start the matrices A (k, d) by target, all for the same targets.

    Returns:
        Symmetric matrices (n, n), in double precision.

    Raises:
        EvaError: there is no example, or a target is no module with a matrix.

    Cost: a forward and a backward pass for each example; n (m d) numbers are kept of each target.
    """
    targets = list(next(iter(starts.values())))
    weights = {name: _weight(model, name) for name in targets}
    frozen = {name: weight.requires_grad for name, weight in weights.items()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in targets}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for example in examples:
            found = torch.autograd.grad(loss(model, example), list(weights.values()))
            for name, gradient in zip(targets, found, strict=True):
                gradients[name].append(gradient.detach())
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(frozen[name])
    n = len(gradients[targets[0]])
    if not n:
        raise EvaError("a kernel needs one example at least, and there is none.")
    kernels = {name: torch.zeros(n, n, dtype=torch.float64) for name in ("full", *starts)}
    for name in targets:
        stacked_nmd = torch.stack(gradients.pop(name))
        kernels["full"] += _gram(stacked_nmd)
        for start, matrices in starts.items():
            kernels[start] += _gram(stacked_nmd @ matrices[name].to(stacked_nmd).T)
    return kernels


def alignment(first_nn: Tensor, second_nn: Tensor, *, n_leading: int) -> float:
    """Return the overlap of the spans of the leading eigenvectors of two kernels, from 0 to 1."""
    leading = [torch.linalg.eigh(kernel)[1][:, -n_leading:].T for kernel in (first_nn, second_nn)]
    return overlap(*leading)


def _gram(stacked_nmk: Tensor) -> Tensor:
    rows = stacked_nmk.flatten(1).cpu().double()
    return rows @ rows.T


def _weight(model: nn.Module, name: str) -> Tensor:
    try:
        weight = model.get_submodule(name).weight
    except AttributeError:
        weight = None
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise EvaError(f"{name} is no module with a weight matrix, so it has no kernel of this kind.")
    return weight
