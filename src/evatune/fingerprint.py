"""Telling one model from another by a few of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

N_MODULES = 64
"""Modules of which weights are kept: some kilobytes, and a fine-tuned model differs in nearly all of them."""
N_WEIGHTS = 3
TOLERANCE = 1 / 256
"""Relative difference that holding weights in bfloat16 may make (half of its last bit is 1/512)."""
SHARE = 0.1
"""Another model differs in more than this share of the weights."""


def sampled_modules(names: Iterable[str]) -> list[str]:
    """Return the modules of which `sampled_weights` keeps weights: `N_MODULES` of these, taken evenly."""
    listed = list(names)
    return listed[:: max(1, -(-len(listed) // N_MODULES))]


def sampled_weights(model: nn.Module, names: Iterable[str]) -> dict[str, list[float]]:
    """Return a few weights of some modules, by module.

    Args:
        model: a base model; weights that are quantized, offloaded or spread over processes are left out.
        names: the modules, of which `N_MODULES` are taken evenly.

    Cost: `N_MODULES * N_WEIGHTS` numbers are read, for which the host waits once for each device.
    """
    parameters = {
        key.replace(".base_layer", "").replace("._orig_mod", ""): parameter
        for key, parameter in model.named_parameters()
        if ".lora_" not in key and ".modules_to_save." not in key
    }
    weights = {name: _weight(parameters, name) for name in sampled_modules(names)}
    entries = {name: _entries(weight) for name, weight in weights.items() if weight is not None}
    found: dict[str, list[float]] = {}
    for kind in {(tensor.device, tensor.dtype) for tensor in entries.values()}:
        alike = {name: tensor for name, tensor in entries.items() if (tensor.device, tensor.dtype) == kind}
        found |= dict(zip(alike, torch.stack(list(alike.values())).tolist(), strict=True))
    return {name: found[name] for name in entries}


def _entries(weight: Tensor) -> Tensor:
    """Return `N_WEIGHTS` entries of a matrix, always the same ones."""
    numbers = torch.tensor([(index * 7919 + 13) % weight.numel() for index in range(N_WEIGHTS)], device="cpu")
    places = zip(*(place.tolist() for place in torch.unravel_index(numbers, weight.shape)), strict=True)
    return torch.stack([weight[place] for place in places])


def modules_with_matrices(model: nn.Module, *, without: Iterable[str] = ()) -> list[str]:
    """Return the modules of a model that have a matrix of their own, but for those inside `without`."""
    left_out = tuple(f"{name}." for name in without)
    return [
        name
        for name, module in model.named_modules()
        if not f"{name}.".startswith(left_out or ("\0",))
        and any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
    ]


def is_other_model(kept: Mapping[str, list[float]], model: nn.Module) -> bool:
    """Return whether a model's weights are others than those that `sampled_weights` kept."""
    now = sampled_weights(model, kept)
    pairs = [pair for name, values in now.items() for pair in zip(kept[name], values, strict=False)]
    differing = sum(abs(a - b) > TOLERANCE * max(abs(a), abs(b)) for a, b in pairs)
    return differing > SHARE * len(pairs)


def _weight(parameters: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return the matrix of a module, or the parameter of this name."""
    own = [parameters[name]] if name in parameters else []
    own += [parameter for key, parameter in parameters.items() if key.rpartition(".")[0] == name]
    plain = [p for p in own if type(p) in (nn.Parameter, Tensor)]  # quantized weights are tensors of their own class
    usable = [p for p in plain if p.ndim >= 2 and p.is_floating_point() and not p.is_meta and p.numel()]
    return usable[0].detach() if usable else None
