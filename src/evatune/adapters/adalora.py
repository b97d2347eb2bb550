"""AdaLoRA's state beside its weights: importance scores of the weights, and the directions that the last cut kept.

PEFT keeps both in memory only. Without them, an interrupted training run cannot resume with the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evatune.errors import EvaError

_SCORES = ("exp_avg_ipt", "exp_avg_unc")
"""PEFT's running means, of the sensitivity of each weight and of its uncertainty (equations 9 and 10)."""


def kept_directions(peft_model: Any) -> dict[str, list[bool]] | None:
    """Return the directions that the last cut kept, by the name of each layer's singular values; None before one."""
    return _config(peft_model).rank_pattern


def set_kept_directions(peft_model: Any, kept: Mapping[str, list[bool]] | None) -> None:
    """Tell PEFT what the last cut kept. It saves these directions only; with None it saves all."""
    _config(peft_model).rank_pattern = None if kept is None else dict(kept)


def allocator_state(peft_model: Any, kept: Mapping[str, list[bool]] | None) -> dict[str, Tensor]:
    """Return the importance scores of an AdaLoRA model and what the last cut kept, as tensors on the CPU.

    Args:
        peft_model: a PEFT model with a trainable AdaLoRA adapter.
        kept: what `kept_directions` returned.
    """
    allocator = peft_model.base_model.rankallocator
    state = {f"kept/{name}": torch.tensor(mask) for name, mask in (kept or {}).items()}
    for score in _SCORES:
        state |= {f"{score}/{name}": value.cpu().contiguous() for name, value in getattr(allocator, score).items()}
    return state


def restore_allocator(peft_model: Any, state: Mapping[str, Tensor]) -> dict[str, list[bool]] | None:
    """Give an AdaLoRA model the scores that `allocator_state` returned.

    Args:
        peft_model: a model of the same adapter.
        state: what was saved.

    Returns:
        The directions that the last cut kept, for `set_kept_directions`.

    Raises:
        EvaError: the state is of another adapter.
    """
    allocator = peft_model.base_model.rankallocator
    weights = dict(peft_model.base_model.model.named_parameters())
    scores: dict[str, dict[str, Tensor]] = {score: {} for score in _SCORES}
    kept = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        if name not in weights or len(weights[name]) != len(value) or kind not in (*_SCORES, "kept"):
            raise EvaError(f"these AdaLoRA scores are of another adapter: {name!r} is not a weight of this size here.")
        if kind == "kept":
            kept[name] = value.tolist()
        else:
            scores[kind][name] = value.to(weights[name].device)
    for score, values in scores.items():
        setattr(allocator, score, values)
    # The scores of the last step must exist, but PEFT computes them anew before it reads them.
    allocator.ipt = {name: torch.zeros_like(value) for name, value in scores[_SCORES[0]].items()}
    return kept or None


def _config(peft_model: Any) -> Any:
    return peft_model.peft_config[peft_model.base_model.trainable_adapter_name]
