"""Removes an adapter and restores the base model: weights, heads, biases, and which parameters require a gradient.

PEFT's own `unload` leaves the trained copy of a head, trained biases, weights that a method has changed, and all
parameters frozen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from evatune.adapters.factors import replace_module
from evatune.errors import EvaError


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseState:
    """State of the base model before it got its adapter."""

    weights: dict[str, Tensor] | None
    """Copies in main memory of the base weights that change, by name; None if they should not be kept."""
    trainable: tuple[str, ...] | None
    """Names of the parameters that required a gradient; None if unknown."""


def copy_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies in main memory of these parameters."""
    return {name: model.get_parameter(name).detach().to("cpu", copy=True) for name in names}


def check_not_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Check that these parameters can be changed.

    Raises:
        EvaError: one of them is shared with another module, which would change too.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        others = [other for other in owners[id(model.get_parameter(name))] if other != name]
        if others:
            raise EvaError(
                f"{name.removesuffix('.weight')!r} shares its weight with {others[0].removesuffix('.weight')!r}, so it "
                "cannot be changed; leave it out with exclude_modules."
            )


def copy_biases(model: nn.Module) -> dict[str, Tensor]:
    """Return copies in main memory of all biases of a base model, which adapters with a `bias` train in place."""
    return {
        re.sub(r"\.(base_layer|original_module|_orig_mod)\b", "", name): parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if "bias" in name and "lora_" not in name and ".modules_to_save." not in name
    }


def trained_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that require a gradient."""
    return tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def remember(
    peft_model: Any, *, originals: Mapping[str, Tensor] | None, trainable: Iterable[str] | None = None
) -> None:
    """Note on a PEFT model what `unload` will restore; an earlier note is not replaced.

    Args:
        peft_model: the model with its adapter.
        originals: copies of the base weights that change; None if they are not kept.
        trainable: names of the parameters of the base model that required a gradient.
    """
    before = base_state(peft_model) or BaseState(weights={}, trainable=None)
    weights = None if originals is None or before.weights is None else {**originals, **before.weights}
    if before.trainable is None and trainable is not None:
        before = replace(before, trainable=tuple(trainable))
    vars(peft_model.base_model)["_evatune_base_state"] = replace(before, weights=weights)


def base_state(peft_model: Any) -> BaseState | None:
    """Return what was noted on this model, or None."""
    tuner = getattr(peft_model, "base_model", None)
    return vars(tuner).get("_evatune_base_state") if tuner is not None else None


def unload(peft_model: PeftModel) -> Any:
    """Remove the adapter and return the base model, bit for bit as it was before `prepare`.

    Heads that were trained whole come back untrained. If `get_peft_model` made the adapter and `initialize` started it,
    biases that were trained in place (`bias="all"` or `"lora_only"`) come back as they were at `initialize`.

    Raises:
        EvaError: base weights have changed and no copy was kept: `keep_base` was false, or evatune did not start this
            adapter.
    """
    noted = base_state(peft_model)
    if noted is None and any(getattr(c, "bias", "none") != "none" for c in peft_model.peft_config.values()):
        raise EvaError(
            "the biases of the base model are trained in place, and evatune did not start this adapter, so there is no "
            "copy of them; load the base model anew."
        )
    if noted is not None and noted.weights is None:
        raise EvaError("the base weights were not kept (keep_base=False); load the base model anew.")
    base: Any = peft_model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            replace_module(base, name, module.original_module)
    base = peft_model.unload()
    if noted is not None:
        for name, weight in (noted.weights or {}).items():
            parameter = base.get_parameter(name)
            parameter.data = weight.to(parameter.device)
        if noted.trainable is not None:
            for name, parameter in base.named_parameters():
                if parameter.is_floating_point():  # weights in 4 bits are not
                    parameter.requires_grad_(name in noted.trainable)
    return base
