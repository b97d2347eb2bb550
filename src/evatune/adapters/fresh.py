"""`Fresh`: a LoRA adapter that has not been trained, and the ranks and alphas in its configuration."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from evatune.activations.processes.sharded_models import sharding_of
from evatune.adapters.applied_plan import initialized_plan, is_trained
from evatune.adapters.config import configured
from evatune.adapters.factors import factors_of
from evatune.adapters.lora import check_can_start, find_adapter, wrapped_parameters
from evatune.errors import EvaError, EvaWarning


@dataclass(frozen=True, kw_only=True, eq=False)
class Fresh:
    """A LoRA adapter that can be started."""

    model: PeftModel
    """The model that carries it."""
    name: str
    """Its name on that model."""
    config: LoraConfig
    """Its configuration."""
    layers: dict[str, LoraLayer]
    """Its layers by the name of their module, without those that are never called."""
    trains_a: bool
    """Whether A will be trained."""

    @cached_property
    def _keys(self) -> dict[str, str]:
        return {name: name for name in self.layers} | wrapped_parameters(self.layers)

    @property
    def ranks(self) -> dict[str, int]:
        """Return the rank that the configuration gives each layer."""
        config = self.config
        return {name: configured(config.rank_pattern, key, default=config.r) for name, key in self._keys.items()}

    @property
    def alphas(self) -> dict[str, float]:
        """Return the alpha that the configuration gives each layer."""
        config = self.config
        return {
            name: configured(config.alpha_pattern, key, default=config.lora_alpha) for name, key in self._keys.items()
        }

    @property
    def widths(self) -> dict[str, int]:
        """Return the width of a row of A of each layer."""
        return {name: sum(pair.width for pair in factors_of(layer, self.name)) for name, layer in self.layers.items()}

    @property
    def out_features(self) -> dict[str, int]:
        """Return the width of the output of each layer."""
        layers = self.layers.items()
        return {name: sum(pair.n_outputs for pair in factors_of(layer, self.name)) for name, layer in layers}

    def measuring(self) -> dict[str, Any]:
        """Return the options with which `measure` learns exactly what a plan for these layers will need."""
        parameters = [name for name, key in wrapped_parameters(self.layers).items() if name == key]
        ranks = self.ranks
        return {
            "target_modules": "|".join(re.escape(name) for name in self.layers if name not in parameters),
            "target_parameters": parameters,
            "rank": next(iter(ranks.values())) if len(set(ranks.values())) == 1 else ranks,
            "train_a": self.trains_a,
        }


def fresh_adapter(peft_model: Any, adapter_name: str = "default") -> Fresh:
    """Return an adapter that can be started.

    Raises:
        EvaError: no PEFT model or one that is spread over processes, an unknown, merged, trained or already initialized
            adapter, or layers that cannot start from components.
    """
    model, config, layers = find_adapter(peft_model, adapter_name)
    check_can_start(layers, adapter_name, config=config)
    if (how := sharding_of(model)) is not None:
        raise EvaError(
            f"the parameters of this model are spread over processes by {how}, so its adapter cannot be written; "
            "measure it with evatune.measure, and initialize the adapter from the spectra before sharding."
        )
    _check_fresh(model, layers, adapter_name)
    return Fresh(
        model=model,
        name=adapter_name,
        config=config,
        layers=_callable_layers(model, layers),
        trains_a=_trains_a(layers, adapter_name),
    )


def _check_fresh(model: PeftModel, layers: dict[str, LoraLayer], adapter_name: str) -> None:
    if initialized_plan(model, adapter_name) is not None:
        raise EvaError(
            f"adapter {adapter_name!r} was initialized before; "
            "make it anew (get_peft_model, or delete_adapter and add_adapter) to initialize it again."
        )
    for name, layer in layers.items():
        if layer.merged_adapters:
            raise EvaError(
                f"adapter {layer.merged_adapters[0]!r} is merged into {name!r}; "
                "call unmerge_adapter() on the model first."
            )
    trained = [name for name, layer in layers.items() if is_trained(layer, adapter_name)]
    if trained:
        raise EvaError(
            f"B of adapter {adapter_name!r} is not zero in {len(trained)} of {len(layers)} layers (first: "
            f"{trained[0]!r}); initialize before training, on an adapter made with init_lora_weights=True."
        )


def _callable_layers(model: PeftModel, layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Return all layers except the output projections of attention modules, which are never called."""
    base = model.get_base_model()
    dead = [name for name in layers if isinstance(_parent(base, name), nn.MultiheadAttention)]
    if dead:
        warnings.warn(
            f"PEFT's adapter on {dead[0]!r} has no effect ({len(dead)} such layers): nn.MultiheadAttention uses the "
            f"weight alone; name {dead[0].rpartition('.')[0].rpartition('.')[2]!r} in target_modules instead.",
            EvaWarning,
            stacklevel=3,
        )
    return {name: layer for name, layer in layers.items() if name not in dead}


def _parent(base: nn.Module, name: str) -> nn.Module | None:
    parent = base.get_submodule(name.rpartition(".")[0]) if "." in name else None
    return getattr(parent, "base_layer", parent)  # type: ignore[return-value]


def _trains_a(layers: Mapping[str, LoraLayer], adapter_name: str) -> bool:
    """Tell whether A will be trained: it will not if every layer has a trainable B and a frozen A."""
    pairs = [pair for layer in layers.values() for pair in factors_of(layer, adapter_name)]
    # PEFT freezes both factors of an inactive adapter; this does not mean that A stays frozen in training.
    return any(pair.down_weight.requires_grad or not pair.up_weight.requires_grad for pair in pairs)
