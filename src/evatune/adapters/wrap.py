"""Puts a PEFT adapter on exactly the targets that were found, and nowhere else.

PEFT resolves names a second time by rules of its own: a name in a list also matches every module whose name ends with
it, lists are shortened, and for mixtures of experts some names are read as those of an earlier release of transformers.
So PEFT gets names, never a pattern of the user, and the modules that it wrapped are compared with the targets.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from evatune.activations.layers.targets import TargetModule
from evatune.adapters.attach import quiet_peft
from evatune.adapters.lora import base_name
from evatune.errors import EvaError, EvaWarning


def wrap(model: Any, config: Any, targets: Sequence[TargetModule]) -> PeftModel:
    """Put an adapter on exactly these targets of a model.

    Args:
        model: the base model; it is changed in place, as PEFT does, also where an error is raised half-way.
        config: a PEFT configuration; the names of the targets are written into it.
        targets: what to adapt.

    Raises:
        EvaError: PEFT would adapt, or has adapted, other modules.

    Warns:
        EvaWarning: what is trained shares a weight with another module.
    """
    _write_names(config, model, targets)
    tied = _tied(model, targets, whole=config.modules_to_save or ())
    with quiet_peft():
        peft_model: Any = get_peft_model(model, config)
    found = [
        base_name(path, module)
        for path, module in peft_model.get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer) and not path.endswith(".base_layer.out_proj")
    ]
    wanted = [target.name for target in targets]
    for names, others, what in ((wanted, set(found), "left out"), (found, set(wanted), "adapted")):
        if other := [name for name in names if name not in others]:
            raise EvaError(
                f"PEFT {what} {other[0]!r} against the settings ({len(other)} modules in all); "
                f"{'it is trained whole, or ' if what == 'left out' else ''}name it in exclude_modules."
            )
    if tied:
        trained, twin = tied
        warnings.warn(
            f"{trained!r} is trained and shares its weight with {twin!r}, which does not change with it: use the "
            "adapter without merging it, since a merged model has one weight for both, or leave the module out.",
            EvaWarning,
            stacklevel=2,
        )
    return peft_model


def _tied(model: nn.Module, targets: Sequence[TargetModule], *, whole: Iterable[str]) -> tuple[str, str] | None:
    """Return the first module that is trained and another module with the same weight, where there are such.

    Args:
        model: the base model.
        targets: what is adapted.
        whole: names of what is trained whole, as PEFT reads them.
    """
    adapted = {id(target.module) for target in targets}
    copied = re.compile(rf"(.*?\.)?({'|'.join(map(re.escape, whole)) or '(?!)'})(?=\.|$)")
    holders: dict[int, list[tuple[str, str | None]]] = {}
    for name, module in model.named_modules():
        copy_of = copied.match(name)
        trained_as = name if id(module) in adapted else copy_of and copy_of[0]
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((name, trained_as))
    for modules in holders.values():
        first = next((name for name, trained_as in modules if trained_as is not None), None)
        if first is not None and len({trained_as for _, trained_as in modules}) > 1:
            return first, next(name for name, _ in modules if name != first)
    return None


def _write_names(config: Any, model: nn.Module, targets: Sequence[TargetModule]) -> None:
    names = [target.name for target in targets if target.parameter is None]
    parameters = [target.name for target in targets if target.parameter is not None]
    misread = _misread(config, model, {name.rpartition(".")[2] for name in names})
    parameters += [f"{name}.weight" for name in names if name.rpartition(".")[2] in misread]
    names = [name for name in names if name.rpartition(".")[2] not in misread]
    endings = {ending for name, _ in model.named_modules() if name not in names for ending in _endings(name)}
    alone = not endings.intersection(names)
    config.target_modules = names if alone else "|".join(map(re.escape, names))
    if parameters:
        config.target_parameters = parameters


def _endings(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[number:]) for number in range(1, len(parts)))


def _misread(config: PeftConfig, model: nn.Module, leaves: Iterable[str]) -> set[str]:
    """Return the last parts of names that PEFT would read as names of experts or routers of this model."""
    found = set()
    for leaf in leaves:
        one: Any = copy.copy(config)
        one.target_modules, one.target_parameters = {f"any.{leaf}"}, None
        try:
            convert_peft_config_for_transformers(one, model=model, conversions=None)
        except ValueError:  # only a part of a fused matrix
            found.add(leaf)
        else:
            found |= set() if one.target_modules == {f"any.{leaf}"} else {leaf}
    return found
