"""The layers of one LoRA adapter: find them, write one, take the adapter off one."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from evatune.adapters.factors import assign, check_form, factors_of, layers_of, replace_module
from evatune.errors import EvaError, near_misses
from evatune.initialization import random_rows


def find_adapter(peft_model: Any, adapter_name: str) -> tuple[PeftModel, LoraConfig, dict[str, LoraLayer]]:
    """Find a LoRA adapter on a PEFT model.

    Args:
        peft_model: what `peft.get_peft_model` or `PeftModel.from_pretrained` returned, compiled or not.
        adapter_name: the adapter's name on that model.

    Returns:
        The model (not compiled), the adapter's configuration, and its layers by the name that their module has in the
        base model, in model order.

    Raises:
        EvaError: no PEFT model, no adapter of that name, or an adapter that is not LoRA.
    """
    model = getattr(peft_model, "_orig_mod", peft_model)
    if not isinstance(model, PeftModel):
        raise EvaError(
            f"a PeftModel is needed, got {type(model).__name__}; "
            "call peft.get_peft_model(model, LoraConfig(...)) first and pass what it returns."
        )
    if adapter_name not in model.peft_config:
        raise EvaError(
            f"the model has no adapter {adapter_name!r}{near_misses(adapter_name, model.peft_config)}; "
            f"its adapters are: {', '.join(map(repr, model.peft_config))}."
        )
    config = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":  # AdaLoRA's config is a LoraConfig too
        raise EvaError(
            f"adapter {adapter_name!r} is of type {getattr(config.peft_type, 'value', config.peft_type)}; "
            "evatune works on LoRA adapters (LoraConfig)."
        )
    layers: dict[str, LoraLayer] = {}
    brought: set[int] = set()
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.r and id(module) not in brought:
            layers[base_name(path, module)] = module
            brought.update(id(part) for part in layers_of(module)[1:])
    return model, config, layers


def base_name(path: str, layer: Any) -> str:
    """Return the name that a PEFT layer, or the parameter that it wraps, has in the base model.

    For the weight of a linear layer it is the name of the layer, whether PEFT has wrapped the layer or the weight.
    """
    name = path.replace("._orig_mod", "").replace(".base_layer", "")
    if not isinstance(layer, ParamWrapper) or isinstance(layer.get_base_layer(), nn.Linear):
        return name
    return f"{name}.{layer.parameter_name}"


def wrapped_parameters(layers: Mapping[str, LoraLayer]) -> dict[str, str]:
    """Return the layers that PEFT adapts as parameters (`target_parameters`), and PEFT's names for these."""
    return {
        name: name if name.endswith(f".{layer.parameter_name}") else f"{name}.{layer.parameter_name}"
        for name, layer in layers.items()
        if isinstance(layer, ParamWrapper)
    }


def down_up(layer: LoraLayer, adapter_name: str) -> tuple[nn.Linear, nn.Linear]:
    """Return the modules that hold `A`, of shape (rank, in_features), and `B`, of shape (out_features, rank)."""
    down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    assert isinstance(down, nn.Linear)
    assert isinstance(up, nn.Linear)
    return down, up


def check_layers(layers: Mapping[str, LoraLayer], adapter_name: str, *, config: LoraConfig) -> None:
    """Check that every layer holds the adapter as two factors, and besides them at most DoRA's magnitude.

    Raises:
        EvaError: a LoRA variant with further tensors, or tied adapters.
    """
    if getattr(config, "ensure_weight_tying", False):
        raise EvaError(
            f"adapter {adapter_name!r} was made with ensure_weight_tying=True, so that embedding and head share one A; "
            "make it without, or leave both out with exclude_modules."
        )
    known = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
    for name, layer in layers.items():
        held = {attribute for attribute in layer.adapter_layer_names if adapter_name in getattr(layer, attribute)}
        if held - known:
            raise EvaError(
                f"adapter {adapter_name!r} sits on {name!r}, a {type(layer.get_base_layer()).__name__} with "
                f"{', '.join(sorted(held))}; evatune works on plain LoRA and DoRA: "
                "leave this module out with exclude_modules."
            )


def check_can_start(layers: Mapping[str, LoraLayer], adapter_name: str, *, config: LoraConfig) -> None:
    """Check that an adapter can be written: it holds factors only, and their shapes fit components.

    Raises:
        EvaError: it cannot, see `check_layers` and `check_form`.
    """
    check_layers(layers, adapter_name, config=config)
    for name, layer in layers.items():
        if adapter_name in layer.lora_magnitude_vector and layer.weight.is_meta:
            raise EvaError(
                f"DoRA needs the norms of the weight of {name!r}, which is offloaded; keep it on a device or take LoRA."
            )
        check_form(name, layer)


@torch.no_grad()
def write_layer(layer: LoraLayer, adapter_name: str, *, A_rd: Tensor, alpha: float, use_rslora: bool) -> None:
    """Give a layer's adapter the rank of `A_rd`, these rows, B = 0 and the scale alpha / r (rsLoRA: alpha / sqrt(r)).

    The parameters stay the same objects wherever possible, so an optimizer made before still trains them. Their dtype,
    device and `requires_grad` are kept, and dropout and the adapter's other settings are not touched.

    Args:
        layer: a LoRA layer that `check_can_start` lets pass.
        adapter_name: the adapter to write.
        A_rd: the new down-projection, shape (rank, in_features), rank >= 1; a linear layer keeps this very tensor if
            it has the right dtype and device.
        alpha: the layer's `lora_alpha`.
        use_rslora: the rule for the scale.
    """
    pairs = factors_of(layer, adapter_name)
    rank = len(A_rd)
    for pair, piece_rd in zip(pairs, A_rd.split([pair.width for pair in pairs], dim=1), strict=True):
        pair.write(piece_rd if len(pairs) == 1 else piece_rd * len(pairs) ** 0.5)
    for part in layers_of(layer):
        part.r[adapter_name] = rank
        part.lora_alpha[adapter_name] = alpha
        # The same expression as in PEFT, so that a reloaded adapter has the same scale to the last bit.
        part.scaling[adapter_name] = alpha / math.sqrt(rank) if use_rslora else alpha / rank
    if adapter_name in layer.lora_magnitude_vector:
        # PEFT's start computes the norms in the base model's dtype, its forward pass in the adapter's. Computed in the
        # latter, magnitude / norm is exactly one and a bfloat16 base model keeps its outputs.
        magnitude: Any = layer.lora_magnitude_vector[adapter_name]
        weight = dequantize_module_weight(layer.get_base_layer()).to(magnitude.weight.dtype)
        norms = magnitude.get_weight_norm(weight, torch.zeros_like(weight[:1, :1]), 1.0)
        assign(magnitude, "weight", norms, device=layer.weight.device)


@torch.no_grad()
def start_at_random(layer: LoraLayer, adapter_name: str, *, seed: int) -> None:
    """Start a layer's adapter as plain LoRA does, if PEFT has not yet done so (`low_cpu_mem_usage=True`).

    Args:
        layer: a LoRA layer that `check_can_start` lets pass.
        adapter_name: the adapter.
        seed: of A.
    """
    pairs = factors_of(layer, adapter_name)
    if not any(pair.down_weight.is_meta for pair in pairs):
        return
    rows = [random_rows(layer.r[adapter_name], pair.width, seed=seed + number) for number, pair in enumerate(pairs)]
    write_layer(
        layer,
        adapter_name,
        A_rd=torch.cat(rows, dim=1),
        alpha=layer.lora_alpha[adapter_name],
        use_rslora=layer.use_rslora[adapter_name],
    )


def remove_layer(model: PeftModel, name: str, adapter_name: str) -> None:
    """Remove an adapter, and no other, from the layer `name`; if it was the last one there, put the base layer back.

    PEFT's own `delete_adapter` of a layer would also activate another adapter and make it trainable. A bias that is
    trained only because of the adapter (`bias="lora_only"`) is frozen.
    """
    base, tuner = model.get_base_model(), cast("Any", model.base_model)
    path, layer = next(
        (path, module)
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer) and base_name(path, module) == name
    )
    for part in layers_of(layer):
        for attribute in {*part.adapter_layer_names, *part.other_param_names, "lora_variant"}:
            values = getattr(part, attribute, {})
            if isinstance(values, MutableMapping | nn.ModuleDict | nn.ParameterDict) and adapter_name in values:
                del values[adapter_name]
    if not layer.r:
        for part in layers_of(layer) if getattr(model.peft_config[adapter_name], "bias", "") == "lora_only" else ():
            bias = getattr(part.get_base_layer(), "bias", None)
            if bias is not None:
                bias.requires_grad_(False)
        if isinstance(layer, MultiheadAttention):
            attention: Any = layer.base_layer
            attention.out_proj = attention.out_proj.base_layer
        replace_module(base, path, layer.base_layer)
        for targeted in (tuner.targeted_module_names, getattr(tuner, "targeted_parameter_names", [])):
            if name in targeted:
                targeted.remove(name)
