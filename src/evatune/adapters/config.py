"""The adapter's `LoraConfig`: read the ranks that it asks for, write the ranks that the plan assigned.

PEFT finds the rank of a module by matching the keys of `rank_pattern` against its name: `layers.1` also matches
`encoder.layers.1`. The keys written here are anchored and escaped, so that each matches one module of the base model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from evatune.allocation import RankPlan


def configured(pattern: Mapping[str, Any] | None, name: str, *, default: Any) -> Any:
    """Return the value that PEFT reads from a `rank_pattern` or `alpha_pattern` for the module `name`."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)


def planned_config(config: LoraConfig, plan: RankPlan, *, parameters: Mapping[str, str] | None = None) -> LoraConfig:
    """Return a copy of `config` from which PEFT rebuilds exactly the layers, ranks and alphas of `plan`.

    Patterns for modules that the plan does not know, `target_modules` and earlier exclusions are kept. The copy has
    `init_lora_weights=True`, which every loader accepts; the saved tensors replace that start anyway.

    Args:
        config: configuration of the adapter as PEFT made it.
        plan: ranks and alphas of its layers by name.
        parameters: the layers that PEFT adapts as parameters, and PEFT's names for these. PEFT can exclude modules
            only, so all parameters that keep an adapter are named.
    """
    parameters = parameters or {}
    planned = copy.copy(config)  # the original may be the caller's, for a second model
    ranks = {parameters.get(name, name): rank for name, rank in plan.ranks.items() if rank > 0}
    alphas = {parameters.get(name, name): plan.alphas[name] for name, rank in plan.ranks.items() if rank > 0}
    known = [parameters.get(name, name) for name in plan.ranks]
    planned.rank_pattern = _pattern(config.rank_pattern, ranks, default=config.r, known=known)
    planned.alpha_pattern = _pattern(config.alpha_pattern, alphas, default=config.lora_alpha, known=known)
    without = [name for name, rank in plan.ranks.items() if rank == 0 and name not in parameters]
    planned.exclude_modules = _exclude(config.exclude_modules, without)
    if parameters:
        planned.target_parameters = [key for name, key in parameters.items() if plan.ranks.get(name, 1) > 0]
    planned.init_lora_weights = True
    planned.eva_config = None
    return planned


def _pattern(
    old: Mapping[str, Any] | None, values: Mapping[str, Any], *, default: Any, known: Iterable[str]
) -> dict[str, Any]:
    pattern = {f"^{re.escape(name)}": value for name, value in values.items() if value != default}
    for key, value in (old or {}).items():
        if not any(get_pattern_key([key], name) == key for name in known):
            pattern[key] = value
    return pattern


def _exclude(old: str | Iterable[str] | None, names: list[str]) -> Any:
    """Add exact names to `exclude_modules`, which PEFT reads as names and endings of names, or as one full regex."""
    if not names:
        return old
    if isinstance(old, str):
        regexes = [old] if old else []
    else:
        regexes = [rf"(.*\.)?{re.escape(ending)}" for ending in sorted(old or ())]
    return "|".join([*regexes, *map(re.escape, names)])
