"""Adapters that start from a product other than zero: what they take out of the base weights, and how it comes back.

Such a method starts from A0, B0 with s B0 A0 ≠ 0 and trains beside W' = W - s B0 A0, so that the outputs stay the base
model's. Its A and B mean nothing beside W. What is saved is therefore the converted adapter of rank 2 r,
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

from evatune.adapters.lora import down_up, find_adapter
from evatune.errors import EvaError
from evatune.methods import METHODS

_IN_CONFIG = {
    name: str(row.settings.get("init_lora_weights", name)) for name, row in METHODS.items() if row.changes_base
}
"""What `init_lora_weights` says of a method that changes the base; PEFT refuses to load what is not its own."""
_IN_CONFIG["lora-ga"] = "lora-ga"  # under its own name PEFT would load the adapter beside the unchanged base, silently


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseChange:
    """What was taken out of the base weights for one adapter."""

    starts: dict[str, tuple[Tensor, Tensor]]
    """A0 and B0 of each layer."""
    originals: dict[str, Tensor] | None
    """The base weights as they were, in main memory; None if they were not to be kept."""


def copy_weights(model: Any, names: list[str]) -> dict[str, Tensor]:
    """Return copies in main memory of the weights of these modules.

    Raises:
        EvaError: one of them is shared with another module, which must not change along.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    copies = {}
    for name in names:
        weight = model.get_submodule(name).weight
        others = [other for other in owners[id(weight)] if other != name]
        if others:
            raise EvaError(
                f"{name!r} shares its weight with {others[0]!r}, so it cannot be changed; "
                "leave it out with exclude_modules."
            )
        copies[name] = weight.detach().to("cpu", copy=True)
    return copies


@torch.no_grad()
def take_out(peft_model: PeftModel, originals: Mapping[str, Tensor], *, method: str, keep_base: bool = True) -> None:
    """Write W - s B A into the base weights for the A and B that the adapter has now, and remember all three.

    Args:
        peft_model: the model with the fresh adapter.
        originals: W of each layer, whatever PEFT has made of it in the meantime.
        method: name of the method.
        keep_base: keep W, so that `unload` can put it back bit for bit.
    """
    model, config, layers = find_adapter(peft_model, "default")
    starts = {}
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        A, B = (matrix.weight.detach().clone() for matrix in down_up(layer, "default"))
        wide = torch.promote_types(originals[name].dtype, torch.float32)
        product = layer.scaling["default"] * (B.to(wide) @ A.to(wide))
        product = product.T if layer.fan_in_fan_out else product  # type: ignore[attr-defined]
        base.weight.data = (originals[name].to(product) - product).to(base.weight)
        starts[name] = (A, B)
    config.init_lora_weights = _IN_CONFIG[method]  # type: ignore[assignment]
    model.base_model.__dict__["_evatune_base_change"] = BaseChange(
        starts=starts, originals=dict(originals) if keep_base else None
    )


def base_change(peft_model: Any) -> BaseChange | None:
    """Return what was taken out of the base weights of this model, or None."""
    tuner = getattr(peft_model, "base_model", None)
    return tuner.__dict__.get("_evatune_base_change") if tuner is not None else None


def unload(peft_model: PeftModel) -> Any:
    """Take the adapter off and return the base model, its weights bit for bit as they were before `prepare`.

    Raises:
        EvaError: the method changed the base weights and they were not kept (`keep_base=False`).
    """
    change = base_change(peft_model)
    if change is None:
        return peft_model.unload()
    if change.originals is None:
        raise EvaError("the base weights were not kept (keep_base=False); load the base model anew.")
    base: Any = peft_model.unload()
    for name, weight in change.originals.items():
        parameter = base.get_submodule(name).weight
        parameter.data = weight.to(parameter.device)
    return base


def convert_saved(peft_model: PeftModel, folder: Path, change: BaseChange) -> None:
    """Rewrite an adapter that PEFT has saved into one of rank 2 r for the untouched base model.

    Args:
        peft_model: the model it was saved from.
        folder: where PEFT wrote it.
        change: what was taken out.
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
    """Put an adapter that was saved as it started, unconverted, on an untouched base model, which changes accordingly.

    Args:
        model: the base model.
        folder: what PEFT's own `save_pretrained` wrote before training.

    Returns:
        The model, ready to train; None if the adapter's method leaves the base as it is.
    """
    config = PeftConfig.from_pretrained(str(folder))
    method = {value: name for name, value in _IN_CONFIG.items()}.get(getattr(config, "init_lora_weights", None))  # type: ignore[arg-type]
    if method is None:
        return None
    config.init_lora_weights = True
    peft_model = PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)
    _, _, layers = find_adapter(peft_model, "default")
    take_out(
        peft_model,
        {name: _weight(layer).detach().to("cpu", copy=True) for name, layer in layers.items()},
        method=method,
    )
    return peft_model


def _weight(layer: LoraLayer) -> Tensor:
    base: Any = layer.get_base_layer()
    return base.weight
