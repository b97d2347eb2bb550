"""How large an adapter is."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from evatune.adapters.factors import layers_of
from evatune.allocation import RankPlan


def count_adapter(model: nn.Module, plan: RankPlan | None = None) -> dict[str, int]:
    """Return the size of a model's adapter.

    Args:
        model: with an adapter, or without one after full fine-tuning.
        plan: the plan of its ranks; targets with rank 0 have no adapter layer any more.

    Returns:
        `trainable`: how many parameters are trained, heads included. `targets`: how many there are. `without_adapter`:
        how many of these got rank 0. `components`: the sum of all ranks, if the adapter is LoRA. A layer with several
        inputs, such as `nn.MultiheadAttention` or fused experts, has one rank.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    brought = {id(part) for layer in layers if isinstance(layer, LoraLayer) for part in layers_of(layer)[1:]}
    layers = [layer for layer in layers if id(layer) not in brought]
    without = list(plan.ranks.values()).count(0) if plan else 0
    return {
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "targets": len(layers) + without,
        "without_adapter": without,
        "components": sum(_rank(layer) for layer in layers if isinstance(layer, LoraLayer)),
    }


def _rank(layer: Any) -> int:
    return sum(layer.r[name] for name in layer.active_adapters if name in layer.r)
