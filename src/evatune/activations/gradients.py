"""Gradients of the loss on a few batches: of whole weights, or only the mean squared norm at each target's output.

Shapes: o output features, d input features.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evatune.activations.batches import device_of, forward_arguments
from evatune.activations.layers.targets import TargetModule, unwrap
from evatune.activations.preserve import measuring_state, preserved_random_state
from evatune.errors import EvaError
from evatune.pca.moments import accumulator_dtype

Loss = Callable[[nn.Module, Any], Tensor]


def batch_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a transformers model computes for a batch with labels.

    Raises:
        EvaError: the model returns no loss, or one that is not a number.
    """
    args, kwargs = forward_arguments(model, batch, keep_labels=True)
    loss = getattr(model(*args, **kwargs), "loss", None)
    if loss is None:
        raise EvaError("the model returned no loss for a batch: put `labels` into the batches or pass loss=….")
    if not torch.isfinite(loss):
        raise EvaError(f"the loss of a batch is {float(loss)}; look for batches whose labels are all ignored.")
    return loss


def weight_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    targets: Sequence[TargetModule],
    n_batches: int = 8,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Return the mean gradient of the loss by the weight of each target.

    Args:
        model: the base model; it is left as it was.
        batches: at least one, with labels.
        targets: whose weights.
        n_batches: how many batches at most.
        loss: computes the loss of a batch, where the model itself does not.

    Returns:
        Gradients by target name, shape (out_features, in_features), float32.

    Raises:
        EvaError: no batch, or no finite loss.

    Cost: `n_batches` forward and backward passes, and memory for all these gradients.
    """
    weights: list[Any] = [target.module.weight for target in targets]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    with _gradients_of(model, weights) as base:
        count = 0
        for batch in first_batches(batches, n_batches):
            count += 1
            gradients = torch.autograd.grad((loss or batch_loss)(base, batch), weights, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                total += 0 if gradient is None else gradient
    return {
        target.name: (total / count if total.shape == (target.out_features, target.in_features) else total.T / count)
        for target, total in zip(targets, sums, strict=True)
    }


def output_gradient_energy(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    targets: Sequence[TargetModule],
    n_batches: int = 8,
    loss: Loss | None = None,
) -> dict[str, float]:
    """Return E‖g‖² of each target, g being the gradient of the loss by one output vector of the target.

    No gradient of a weight is computed, so only activations take memory.

    Args:
        model: the base model; it is left as it was.
        batches: at least one, with labels.
        targets: whose outputs.
        n_batches: how many batches at most.
        loss: computes the loss of a batch, where the model itself does not.

    Returns:
        Mean squared norm by target name; 0 where no gradient arrives.

    Raises:
        EvaError: no batch, or no finite loss.

    Cost: `n_batches` forward and backward passes.
    """
    sums: dict[str, Tensor] = {}
    rows = Counter[str]()

    def watch(name: str) -> Callable[..., None]:
        def note(gradient: Tensor) -> None:
            # Read at the end only: for every number that the host reads, it waits for the device.
            energy = gradient.float().square().sum().to(accumulator_dtype(gradient.device))
            sums[name] = sums[name] + energy if name in sums else energy
            rows[name] += gradient[..., 0].numel()

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if not output.requires_grad:  # everything before it is frozen: the graph begins here
                output.requires_grad_()
            output.register_hook(note)

        return hook

    handles = [target.module.register_forward_hook(watch(target.name)) for target in targets]
    try:
        with _gradients_of(model, []) as base:
            for batch in first_batches(batches, n_batches):
                (loss or batch_loss)(base, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
    device = device_of(unwrap(model))
    totals = torch.stack([total.to(device) for total in sums.values()]).tolist() if sums else []
    means = {name: total / max(rows[name], 1) for name, total in zip(sums, totals, strict=True)}
    return {target.name: means.get(target.name, 0.0) for target in targets}


@contextmanager
def _gradients_of(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[nn.Module]:
    """Let these weights and no others require gradients; restore that, mode, cache and random state on exit."""
    base = unwrap(model)
    required = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    with torch.enable_grad(), preserved_random_state(), measuring_state(base):
        try:
            for parameter, _ in required:
                parameter.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            yield base
        finally:
            for parameter, before in required:
                parameter.requires_grad_(before)


def first_batches(batches: Iterable[Any], n_batches: int) -> Iterator[Any]:
    """Yield at most `n_batches` batches.

    Raises:
        EvaError: there is none, or none is wanted.
    """
    if n_batches < 1:
        raise EvaError(f"the number of batches to look at must be at least 1, got {n_batches}.")
    empty = True
    for batch in itertools.islice(batches, n_batches):
        empty = False
        yield batch
    if empty:
        raise EvaError("there was no batch to look at: the iterable is empty, or a generator that is used up already.")
