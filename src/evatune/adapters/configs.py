"""The PEFT configuration of each kind of adapter, without the targets, which `evatune.adapters.wrap` writes into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
from peft.tuners.lora.config import CordaConfig, LoraGAConfig

from evatune.errors import EvaError
from evatune.settings import Adapter

_SUBSECTIONS: dict[Any, tuple[str, type]] = {
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
}
"""Value of `init_lora_weights` -> the further configuration that PEFT needs for it."""


def lora(adapter: Adapter, *, settings: Mapping[str, Any], common: Mapping[str, Any], **others: Any) -> peft.LoraConfig:
    """Return the configuration of a LoRA adapter.

    Args:
        adapter: rank, scale and dropout.
        settings: settings of the method and its options.
        common: fields of all PEFT configurations: the task type, and the modules that are trained whole.
        others: values that only other adapters need; ignored.
    """
    further = dict(settings)
    if (start := settings.get("init_lora_weights")) in _SUBSECTIONS:
        field, kind = _SUBSECTIONS[start]
        further[field] = kind()
    return peft.LoraConfig(r=adapter.rank, **_scaled(adapter), **common, **further)


def adalora(
    adapter: Adapter, *, common: Mapping[str, Any], total_steps: int | None, **others: Any
) -> peft.AdaLoraConfig:
    """Return the configuration of an AdaLoRA adapter, which starts at rank r + 4 (Appendix C of the EVA paper)."""
    if total_steps is None or total_steps < 4:
        raise EvaError(
            f"adalora's schedule needs the number of optimizer steps, at least 4: total_steps={total_steps!r}."
        )
    return peft.AdaLoraConfig(
        init_r=adapter.rank + 4,
        target_r=adapter.rank,
        total_step=total_steps,
        tinit=total_steps // 10,
        tfinal=max(1, total_steps // 4),
        **_scaled(adapter),
        **common,
    )


def vera(adapter: Adapter, *, common: Mapping[str, Any], seed: int, **others: Any) -> peft.VeraConfig:
    """Return the configuration of a VeRA adapter."""
    return peft.VeraConfig(r=adapter.rank, vera_dropout=adapter.lora_dropout, projection_prng_key=seed, **common)


def boft(adapter: Adapter, *, common: Mapping[str, Any], **others: Any) -> peft.BOFTConfig:
    """Return the configuration of a BOFT adapter."""
    return peft.BOFTConfig(
        boft_block_size=adapter.block_size,
        boft_n_butterfly_factor=2,
        boft_dropout=adapter.lora_dropout,
        **common,
    )


def _scaled(adapter: Adapter) -> dict[str, Any]:
    # PEFT takes fractions for alpha.
    return {"lora_alpha": adapter.lora_alpha, "lora_dropout": adapter.lora_dropout}
