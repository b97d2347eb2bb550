"""Adapters that start with B A ≠ 0: what they subtract from the base weights, and how saved adapters account for it.

Such a method starts from A0, B0 with s B0 A0 ≠ 0 and trains with the base weight W' = W - s B0 A0, so that the first
outputs are the base model's. Its A and B are wrong for W. Therefore the converted adapter of rank 2 r is saved,
[B, -B0] [A; A0], for which W + s (B A - B0 A0) = W' + s B A: it loads onto the untouched base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from evatune.adapters.all_or_nothing import all_or_nothing
from evatune.adapters.lora import down_up, find_adapter
from evatune.adapters.unloading import remember, trained_names
from evatune.methods import METHODS
from evatune.pca.products import unrounded


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseChange:
    """What was subtracted from the base weights for one adapter."""

    starts: dict[str, tuple[Tensor, Tensor]]
    """A0 and B0 of each layer."""


@torch.no_grad()
def take_out(peft_model: PeftModel, originals: Mapping[str, Tensor], *, method: str) -> None:
    """Write W - s B A into the base weights for the A and B that the adapter has now, and remember A and B.

    The configuration then has the name of the method as `init_lora_weights`. `load_start` reads it. PEFT itself refuses
    to load such an adapter, which would be wrong for the unchanged base model.

    Args:
        peft_model: the model with the fresh adapter.
        originals: W of each layer by the name of the parameter, as it was before PEFT changed it.
        method: name of the method.
    """
    model, config, layers = find_adapter(peft_model, "default")
    starts = {}
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        A, B = (matrix.weight.detach().clone() for matrix in down_up(layer, "default"))
        original = originals[f"{name}.weight"]
        wide = torch.promote_types(original.dtype, torch.float32)
        with unrounded(B.device):
            product = layer.scaling["default"] * (B.to(wide) @ A.to(wide))
        product = product.T if layer.fan_in_fan_out else product  # type: ignore[attr-defined]
        base.weight.data = (original.to(product) - product).to(base.weight)
        starts[name] = (A, B)
    config.init_lora_weights = method  # type: ignore[assignment]
    vars(model.base_model)["_evatune_base_change"] = BaseChange(starts=starts)


def base_change(peft_model: Any) -> BaseChange | None:
    """Return what was subtracted from the base weights of this model, or None."""
    tuner = getattr(peft_model, "base_model", None)
    return vars(tuner).get("_evatune_base_change") if tuner is not None else None


def convert_saved(peft_model: PeftModel, folder: Path, change: BaseChange) -> None:
    """Rewrite an adapter that PEFT has saved into one of rank 2 r for the untouched base model.

    Args:
        peft_model: the model it was saved from.
        folder: where PEFT wrote it.
        change: what was subtracted from the base weights.
    """
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    for name, (A0, B0) in change.starts.items():
        down, up = (f"base_model.model.{name}.lora_{side}.weight" for side in "AB")
        tensors[down] = torch.cat([tensors[down], A0.to(tensors[down])], dim=0)
        tensors[up] = torch.cat([tensors[up], -B0.to(tensors[up])], dim=1)
    config = LoraConfig.from_pretrained(str(folder))
    assert not config.rank_pattern and not config.alpha_pattern  # these methods have uniform ranks
    config.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)  # type: ignore[assignment]
    config.r, config.init_lora_weights = 2 * config.r, True
    for leftover in ("corda_config", "lora_ga_config"):
        setattr(config, leftover, None)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load_start(model: Any, folder: str | Path) -> PeftModel | None:
    """Put an adapter that was saved unconverted on an untouched base model; this changes the base weights.

    Args:
        model: the base model.
        folder: what PEFT's own `save_pretrained` wrote before training.

    Returns:
        The model, ready to train; None if the adapter's method leaves the base as it is.
    """
    config = PeftConfig.from_pretrained(str(folder))
    method = getattr(config, "init_lora_weights", None)
    if not isinstance(method, str) or method not in METHODS or not METHODS[method].changes_base:
        return None
    config.init_lora_weights = True  # type: ignore[attr-defined]
    trainable = trained_names(model)
    with all_or_nothing(model):
        peft_model = PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)
        _, _, layers = find_adapter(peft_model, "default")
        originals = {f"{name}.weight": _weight(layer).detach().to("cpu", copy=True) for name, layer in layers.items()}
        take_out(peft_model, originals, method=method)
        remember(peft_model, originals=originals, trainable=trainable)
    return peft_model


def _weight(layer: LoraLayer) -> Tensor:
    base: Any = layer.get_base_layer()
    return base.weight
