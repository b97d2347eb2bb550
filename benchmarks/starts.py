"""Starts of adapters that are timed beside each other: evatune's, PEFT's EVA, and other methods.

A part of `benchmarks/accelerator.py`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

import evatune

STARTS = ("evatune", "peft-eva", "pissa", "olora", "corda", "lora-ga")


def begin(name: str, model: Any, batches: list[dict[str, torch.Tensor]], *, rank: int) -> None:
    """Start an adapter with all batches, by evatune, by another method, or by PEFT's EVA."""
    if name == "evatune":
        unlimited: dict[str, Any] = {"tau": None, "min_gain": None, "progress": False}
        evatune.prepare(model, method="eva", rank=rank, rho=2.0, batches=batches, keep_base=False, **unlimited)
    elif name == "peft-eva":
        peft_eva(model, batches, rank=rank)
    else:
        needs = {"batches": batches} if name in ("corda", "lora-ga") else {}
        evatune.prepare(model, method=name, rank=rank, gradient_batches=len(batches), keep_base=False, **needs)


def peft_eva(model: Any, batches: list[dict[str, torch.Tensor]], *, rank: int) -> None:
    """Measure the same batches with PEFT's EVA, which takes them on the device and without labels."""
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora import eva

    from initialization import CappedLoader, CapReachedError

    # A model that is no PeftModel yet needs the names: PEFT finds no module under "all-linear" then, and measures none.
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    config = LoraConfig(r=rank, init_lora_weights="eva", target_modules=names, eva_config=EvaConfig(rho=2.0))
    there = [{key: value.to(model.device) for key, value in batch.items() if key != "labels"} for batch in batches]
    with suppress(CapReachedError):
        eva.get_eva_state_dict(model, CappedLoader(there, endless=False), config, show_progress_bar=False)
