"""`evatune.initialize`: the one call between `get_peft_model` and training."""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from evatune.activations import measure
from evatune.activations.processes.sharded_models import sharding_of
from evatune.adapters.all_or_nothing import all_or_nothing
from evatune.adapters.config import configured, planned_config
from evatune.adapters.factors import factors_of
from evatune.adapters.fit import fit_spectra
from evatune.adapters.lora import (
    check_can_start,
    find_adapter,
    remove_layer,
    start_at_random,
    wrapped_parameters,
    write_layer,
)
from evatune.adapters.taking_off import copy_biases, remember
from evatune.allocation import RankPlan
from evatune.errors import EvaError, EvaWarning
from evatune.initialization import eva
from evatune.settings import Measuring, Planning
from evatune.spectra import Spectra

_FROM_ADAPTER = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "rank",
    "rho",
    "metric",
    "budget",
    "train_a",
)
"""Options of `measure` that follow from the adapter and the arguments of `initialize`."""

_CALL = ("forward", "progress", "settings")
"""Arguments of `measure` that are no settings."""


def initialize(
    peft_model: Any,
    batches_or_spectra: Iterable[Any] | Spectra,
    *,
    adapter_name: str = "default",
    rho: float = 2.0,
    metric: str = "ratio",
    budget: str = "components",
    whiten: bool = False,
    **measure_options: Any,
) -> RankPlan:
    """Redistribute the ranks of a fresh LoRA adapter and start it from EVA.

    The adapter's `LoraConfig` gives the rank and alpha of each layer (`r`, `lora_alpha`, `rank_pattern`,
    `alpha_pattern`) and so the budget. The base model's activations decide which layers get it. Each `A` becomes the
    leading principal components of its layer's input, `B` becomes zero, and each alpha changes with its rank so that
    the adapter keeps its scale: the outputs are the base model's. A layer that gets rank 0 loses the adapter. Nothing
    is changed if anything is wrong.

    Args:
        peft_model: what `peft.get_peft_model` returned. Other adapters on it are left alone.
        batches_or_spectra: batches as the model takes them, from any iterable, or spectra measured before.
        adapter_name: the adapter to initialize.
        rho: a layer gets at most round(rho * its rank) components; 1 keeps all ranks as they are.
        metric: how components of different layers compare, see `Spectra.plan`.
        budget: what is given away, "components" or trainable "parameters", of which a component of a wide layer takes
            more. If every `A` is frozen (call `evatune.adapters.freeze_a` before), only `B` counts.
        whiten: divide each row of `A` by the square root of its singular value.
        measure_options: passed to `evatune.measure` (`max_batches`, `tau`, `use_label_mask`, ...).

    Returns:
        The plan that was applied.

    Layers that no batch reaches keep the rank and the random start that LoRA gives them, outside the budget, and a
    warning names them. The adapter sits where PEFT has put it; spectra may be of more modules than that.

    Raises:
        EvaError: no PEFT model or one that is spread over processes, an unknown, merged, trained or already initialized
            adapter, layers that cannot start from components, spectra of other modules, or an argument that is out of
            range. Whatever is raised, the model is as it was then.

    Cost: that of `evatune.measure`; after it, O(sum of ranks * in_features).

    Reference: Algorithm 1 of the EVA paper.

    Example:
        >>> model = get_peft_model(base, LoraConfig(r=16, lora_alpha=1, target_modules="all-linear"))
        >>> plan = evatune.initialize(model, loader, rho=2.0)
        >>> trainer.train()
    """
    model, config, layers = find_adapter(peft_model, adapter_name)
    check_can_start(layers, adapter_name, config=config)
    if (how := sharding_of(model)) is not None:
        raise EvaError(
            f"the parameters of this model are spread over processes by {how}, so its adapter cannot be written; "
            "measure it with evatune.measure, and initialize the adapter from the spectra before sharding."
        )
    _check_fresh(model, layers, adapter_name)
    # What is out of range is refused before minutes of measuring.
    Planning.of({"rho": rho, "metric": metric, "budget": budget}, call="evatune.initialize")
    _check_options(measure_options, measured=isinstance(batches_or_spectra, Spectra))
    _warn_of_eva_config(config, rho=rho, whiten=whiten)

    measured = _callable_layers(model, layers)
    keys = {name: name for name in measured} | wrapped_parameters(measured)
    ranks = {name: configured(config.rank_pattern, key, default=config.r) for name, key in keys.items()}
    alphas = {name: configured(config.alpha_pattern, key, default=config.lora_alpha) for name, key in keys.items()}
    planning: dict[str, Any] = {
        "rho": rho,
        "metric": metric,
        "budget": budget,
        "train_a": _trains_a(layers, adapter_name),
    }
    given = isinstance(batches_or_spectra, Spectra)
    if isinstance(batches_or_spectra, Spectra):
        spectra = batches_or_spectra
    else:
        spectra = measure(model, batches_or_spectra, **_needed(measured, ranks) | planning | measure_options)
    widths = {name: sum(pair.width for pair in factors_of(layer, adapter_name)) for name, layer in measured.items()}
    spectra = fit_spectra(spectra, widths, warn=given).spectra
    plan = spectra.plan(rank=ranks, lora_alpha=alphas, use_rslora=config.use_rslora, **planning)
    down = {
        name: eva(spectra[name].components, rank, singular_values=spectra[name].singular_values, whiten=whiten)
        for name, rank in plan.ranks.items()
    }
    with all_or_nothing(model):
        apply_plan(model, plan, down=down, adapter_name=adapter_name)
    return plan


def apply_plan(peft_model: Any, plan: RankPlan, *, down: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Give a fresh adapter the ranks and alphas of a plan, the rows `down` as `A`, and B = 0; nothing is checked.

    Args:
        peft_model: the model that carries the adapter.
        plan: for the adapter's layers; those that it does not know start as LoRA does.
        down: `A` of each layer, shape (its rank, in_features).
        adapter_name: the adapter.
    """
    model, config, layers = find_adapter(peft_model, adapter_name)
    planned = planned_config(config, plan, parameters=wrapped_parameters(layers))
    if config.bias != "none":
        remember(model, originals=copy_biases(model.get_base_model()))
    for name, layer in layers.items():
        if name not in plan.ranks:
            start_at_random(layer, adapter_name, seed=zlib.crc32(name.encode()))
        elif plan.ranks[name] == 0:
            remove_layer(model, name, adapter_name)
        else:
            write_layer(layer, adapter_name, A_rd=down[name], alpha=plan.alphas[name], use_rslora=config.use_rslora)
    model.peft_config[adapter_name] = planned
    _plans(model)[adapter_name] = (planned, plan)


def initialized_plan(peft_model: Any, adapter_name: str = "default") -> RankPlan | None:
    """Return the plan that `initialize` applied to this adapter in this process, or None.

    Raises:
        EvaError: no PEFT model, or no LoRA adapter of that name.
    """
    model, config, _ = find_adapter(peft_model, adapter_name)
    # An adapter that was deleted and made anew under the same name has another config.
    applied_to, plan = _plans(model).get(adapter_name, (None, None))
    return plan if applied_to is config else None


def require_initialized(peft_model: Any, adapter_name: str = "default", *, asked: bool | None = None) -> None:
    """Check, before training, that an adapter which is to start from EVA does.

    For `init_lora_weights="eva"` PEFT itself makes a random `A` and waits for a second call; without that call,
    training starts from random directions and says nothing.

    Args:
        peft_model: the model that is about to be trained.
        adapter_name: the adapter that is about to be trained.
        asked: whether EVA was asked for; None reads it from the adapter's config (`init_lora_weights="eva"` or an
            `eva_config`).

    Raises:
        EvaError: EVA was asked for, no plan was applied, `B` is zero everywhere and `A` is not made of components
            either, as it is in an initial adapter that was loaded from disk.
    """
    model, config, layers = find_adapter(peft_model, adapter_name)
    if asked is None:
        asked = config.init_lora_weights == "eva" or config.eva_config is not None
    if not asked or initialized_plan(model, adapter_name) is not None:
        return
    if any(_is_trained(layer, adapter_name) for layer in layers.values()):
        return
    blocks = [block for layer in layers.values() for pair in factors_of(layer, adapter_name) for block in pair.blocks()]
    if blocks and all(map(_has_orthogonal_rows, blocks)):
        return
    raise EvaError(
        f"adapter {adapter_name!r} is to start from EVA but was never initialized, so its A is random; "
        "call evatune.initialize(model, batches) before training, or ask for init_lora_weights=True."
    )


def _plans(model: PeftModel) -> dict[str, tuple[LoraConfig, RankPlan]]:
    return model.base_model.__dict__.setdefault("_evatune_plans", {})


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
    trained = [name for name, layer in layers.items() if _is_trained(layer, adapter_name)]
    if trained:
        raise EvaError(
            f"B of adapter {adapter_name!r} is not zero in {len(trained)} of {len(layers)} layers (first: "
            f"{trained[0]!r}); initialize before training, on an adapter made with init_lora_weights=True."
        )


def _check_options(options: Mapping[str, Any], *, measured: bool) -> None:
    if measured and options:
        raise EvaError(
            f"{', '.join(sorted(options))}: these options are for measuring, but spectra were given; "
            "leave them out or give batches."
        )
    taken = [name for name in options if name in _FROM_ADAPTER]
    if taken:
        raise EvaError(f"{', '.join(taken)} cannot be given here: the adapter's LoraConfig says it.")
    if not measured:
        Measuring.of({name: value for name, value in options.items() if name not in _CALL}, call="evatune.measure")


def _callable_layers(model: PeftModel, layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Return the layers without output projections of attention modules, which are never called."""
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


def _needed(layers: Mapping[str, LoraLayer], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the options that make `measure` learn what the plan will need, of these targets and no others."""
    parameters = [name for name, key in wrapped_parameters(layers).items() if name == key]
    options: dict[str, Any] = {
        "target_modules": "|".join(re.escape(name) for name in layers if name not in parameters),
        "target_parameters": parameters,
    }
    return options | {"rank": next(iter(ranks.values())) if len(set(ranks.values())) == 1 else dict(ranks)}


def _is_trained(layer: LoraLayer, adapter_name: str) -> bool:
    """Tell whether the adapter changes anything; PEFT starts embeddings from A = 0, all else from B = 0."""
    pairs = [pair for pair in factors_of(layer, adapter_name) if not pair.up_weight.is_meta]
    return any(bool(pair.up_weight.any()) and bool(pair.down_weight.any()) for pair in pairs)


def _trains_a(layers: Mapping[str, LoraLayer], adapter_name: str) -> bool:
    """Tell whether A will be trained; it will not where B is trained beside a frozen A everywhere."""
    pairs = [pair for layer in layers.values() for pair in factors_of(layer, adapter_name)]
    # PEFT freezes both factors of an adapter that is not active, which says nothing of its training.
    return any(pair.down_weight.requires_grad or not pair.up_weight.requires_grad for pair in pairs)


def _has_orthogonal_rows(A_rd: Tensor) -> bool:
    """Tell principal components, whitened or not, from PEFT's random rows; of a single row, by its length."""
    if A_rd.is_meta:
        return False
    rows = A_rd.detach().float()
    rows = rows[rows.any(dim=1)]  # later pieces of a narrow part of a stacked input are zero
    if not len(rows):
        return False
    lengths = rows.norm(dim=1, keepdim=True)
    if len(rows) == 1:
        return bool((lengths - 1).abs() < 1e-2)
    rows = rows / lengths
    return bool((rows @ rows.T - torch.eye(len(rows), device=rows.device)).abs().max() < 1e-2)


def _warn_of_eva_config(config: LoraConfig, *, rho: float, whiten: bool) -> None:
    received = {"rho": rho, "whiten": whiten}
    for name, value in received.items():
        configured_value = getattr(config.eva_config, name, value)
        if configured_value != value:
            warnings.warn(
                f"the adapter's eva_config says {name}={configured_value}, evatune.initialize was called with "
                f"{name}={value}: the call counts.",
                EvaWarning,
                stacklevel=3,
            )
