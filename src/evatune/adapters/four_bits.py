"""Base weights in 4 bits (NF4), as QLoRA holds them, and back (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from evatune.activations.layers.targets import TargetModule, TargetRules, find_targets
from evatune.adapters.factors import replace_module
from evatune.errors import EvaError
from evatune.settings import Targets, takes


@takes(Targets)
def quantize_targets(model: nn.Module, *, device: torch.device | None = None, **options: Any) -> None:
    """Hold the weights of the targets in 4 bits (NF4), as QLoRA does.

    Args:
        model: changed in place; targets in 4 bits already are left alone.
        device: where the weights in 4 bits are; by default where they were.
        options: which modules are targets, as in `prepare`; see the list below.

    Raises:
        EvaError: bitsandbytes is not installed, or a module is not an `nn.Linear`.
    """
    quantize(model, find_targets(model, TargetRules.of(options, call="quantize_targets")), device=device)


def quantize(model: nn.Module, targets: Sequence[TargetModule], *, device: torch.device | None = None) -> None:
    """Hold the weights of these targets in 4 bits; see `quantize_targets`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EvaError("qlora needs the package bitsandbytes, which is not installed: pip install bitsandbytes.")
    from bitsandbytes.nn import Linear4bit, Params4bit

    modules = {target.name: target.module for target in targets}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            raise EvaError(f"{name!r} is a {type(module).__name__}; qlora holds nn.Linear weights in 4 bits only.")
    for name, module in modules.items():
        if isinstance(module, Linear4bit):
            continue
        assert isinstance(module, nn.Linear)
        weight = module.weight
        quantized = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        quantized.bias = module.bias
        # On a CPU, bitsandbytes repacks the weights at the first evaluation; after that they pass no gradient.
        quantized.support_avx512bf16_for_cpu = False
        packed: Any = Params4bit(weight.detach(), requires_grad=False, quant_type="nf4", module=quantized)
        quantized.weight = packed.to(device or weight.device)  # this is where bitsandbytes quantizes
        replace_module(model, name, quantized.train(module.training))
    # PEFT reads from the model, not the layer, whether to use its adapter for 4 bits; only that one can be merged.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def quantized_bytes(n_weights: int) -> int:
    """Return the bytes of a weight that `quantize` holds in 4 bits.

    Each number takes half a byte, each block of 64 a scale in 8 bits, each 256 blocks a scale of these in float32; two
    tables explain the codes.
    """
    n_blocks = -(-n_weights // 64)
    return n_weights // 2 + n_blocks + 4 * -(-n_blocks // 256) + 4 * (16 + 256)


def dequantize_targets(model: nn.Module) -> None:
    """Replace every layer in 4 bits by an ordinary one that computes the same, with the rounded weight.

    An adapter that was trained with 4-bit base weights merges into these without loss.

    Args:
        model: changed in place; no PEFT model.

    Raises:
        EvaError: a PEFT model, one that transformers quantized, or one without layers in 4 bits.

    Example:
        >>> quantize_targets(base, target_modules="all-linear")  # doctest: +SKIP
        >>> dequantize_targets(base)  # doctest: +SKIP
        >>> merged = load_adapter(base, "adapter").merge_and_unload()  # doctest: +SKIP
    """
    if isinstance(model, PeftModel):
        raise EvaError("dequantize_targets takes a base model: save the adapter, take it off, and load it afterwards.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise EvaError("transformers quantized this model and knows best how to undo it: call model.dequantize().")
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    if not layers:
        raise EvaError("no layer of the model is in 4 bits; call quantize_targets first.")
    for name, layer in layers.items():
        packed: Any = layer
        plain = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
        plain.bias = packed.bias
        weight: Any = dequantize_module_weight(layer)
        plain.weight = nn.Parameter(weight.detach().to(packed.compute_dtype), requires_grad=False)
        replace_module(model, name, plain.train(layer.training))
    model.is_loaded_in_4bit = False  # type: ignore[assignment]
