"""The bridge to PEFT: what a plan and its components become in a LoRA adapter. Nothing else in evatune imports peft."""

from __future__ import annotations

from evatune.adapters.applied_plan import initialized_plan, require_initialized
from evatune.adapters.as_in_peft import initialize_lora_eva_weights
from evatune.adapters.attach import save_adapter
from evatune.adapters.export import export_portable
from evatune.adapters.initialize import initialize
from evatune.adapters.prepare import freeze_a, prepare
from evatune.adapters.unloading import unload

__all__ = [
    "export_portable",
    "freeze_a",
    "initialize",
    "initialize_lora_eva_weights",
    "initialized_plan",
    "prepare",
    "require_initialized",
    "save_adapter",
    "unload",
]
