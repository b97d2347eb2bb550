"""Layer-wise decay of the learning rate (Clark et al. 2020, arXiv:2003.10555): lower layers learn more slowly."""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import nn


def layerwise_optimizer(
    model: nn.Module, *, learning_rate: float, decay: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Return AdamW whose learning rate falls by a factor with every layer below the head.

    Args:
        model: its trainable parameters are taken.
        learning_rate: of the head, and of whatever else stands above the blocks.
        decay: learning rate of a block over that of the next one above; what stands below them counts as one block.
        weight_decay: of all matrices.
    """
    depths = layer_depths(model)
    top = max(depths.values())
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((depths[name], parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "lr": learning_rate * decay ** (top - depth),
                "weight_decay": weight_decay if is_matrix else 0.0,
            }
            for (depth, is_matrix), members in groups.items()
        ],
        lr=learning_rate,
    )


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Return the number of layers below each parameter: 0 before all blocks, n + 1 after n blocks.

    The blocks are the list of modules (`encoder.layer.0`, `encoder.layer.1`, ...) that holds the most parameters;
    modules that are registered before it are below it, modules that are registered after it are above it.
    """
    parameters = dict(model.named_parameters())
    places = {name: match for name in parameters if (match := re.match(r"(.*?\.)(\d+)\.", name))}
    sizes: Counter[str] = Counter()
    for name, place in places.items():
        sizes[place[1]] += parameters[name].numel()
    trunk = max(sizes, key=sizes.__getitem__, default="")
    blocks = {name: int(place[2]) + 1 for name, place in places.items() if place[1] == trunk}
    above = max(blocks.values(), default=0) + 1
    depths, passed = {}, not blocks
    for name in parameters:
        passed = passed or name in blocks
        depths[name] = blocks.get(name, above if passed else 0)
    return depths
