"""`evatune.initialize`: the one call between `get_peft_model` and training."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from peft import LoraConfig
from torch import Tensor

from evatune.activations import measure
from evatune.activations.measure import Forward, RowMask
from evatune.adapters.all_or_nothing import all_or_nothing
from evatune.adapters.applied_plan import note_plan
from evatune.adapters.config import planned_config
from evatune.adapters.fit import fit_spectra
from evatune.adapters.fresh import Fresh, fresh_adapter
from evatune.adapters.lora import find_adapter, remove_layer, start_at_random, wrapped_parameters, write_layer
from evatune.adapters.unloading import copy_biases, remember
from evatune.allocation import RankPlan
from evatune.errors import EvaError, EvaWarning
from evatune.initialization import eva
from evatune.settings import Measuring, Ranking, Targets, takes
from evatune.spectra import Spectra

_FROM_ADAPTER = (*Targets.field_names(), "rank", "train_a")
"""Options of `measure` that follow from the adapter."""
_OF_PLAN = [name for name in Ranking.field_names() if name not in _FROM_ADAPTER]
"""Options that count for spectra that were measured before, too."""


@takes(Measuring, without=_FROM_ADAPTER)
def initialize(
    peft_model: Any,
    batches_or_spectra: Iterable[Any] | Spectra,
    *,
    adapter_name: str = "default",
    whiten: bool = False,
    force: bool = False,
    forward: Forward | None = None,
    row_mask: RowMask | None = None,
    progress: bool = True,
    settings: Measuring | None = None,
    **options: Any,
) -> RankPlan:
    """Redistribute the ranks of a fresh LoRA adapter and initialize it with EVA.

    The adapter's `LoraConfig` gives the rank and alpha of each layer (`r`, `lora_alpha`, `rank_pattern`,
    `alpha_pattern`) and so the budget. The base model's activations decide which layers get how much of it. Each `A`
    becomes the leading principal components of its layer's input, `B` becomes zero, and each alpha changes with its
    rank so that the adapter keeps its scale: the outputs are the base model's. A layer that gets rank 0 loses the
    adapter. Layers that no batch reaches keep the rank and the random start that LoRA gives them, outside the budget,
    and a warning names them.

    Args:
        peft_model: what `peft.get_peft_model` returned; the adapter sits where PEFT has put it. Other adapters on it
            are left alone.
        batches_or_spectra: batches as the model takes them, from any iterable, or spectra measured before, of the
            adapter's modules or of more.
        adapter_name: the adapter to initialize.
        whiten: divide each row of `A` by the square root of its singular value.
        force: take spectra that were measured on another model.
        forward: calls the model with a batch, see `evatune.measure`.
        row_mask: says which rows count, see `evatune.measure`.
        progress: show a bar while measuring.
        settings: all options in one object, as for `evatune.measure`; the options below change it. Its targets, rank
            and `train_a` are not looked at, since the adapter says them.
        options: see the list below. With spectra, only rho, metric and budget can be given. If every `A` is frozen
            (call `evatune.adapters.freeze_a` before), only `B` counts as trainable parameters.

    Returns:
        The plan that was applied.

    Raises:
        EvaError: no PEFT model or one that is spread over processes, an unknown, merged, trained or already initialized
            adapter, layers that cannot start from components, spectra of other modules or of another model, or an
            argument that is out of range. After any error the model is as it was before.

    Cost: that of `evatune.measure`; after it, O(sum of ranks * in_features).

    Reference: Algorithm 1 of the EVA paper.

    Example:
        >>> model = get_peft_model(base, LoraConfig(r=16, lora_alpha=1, target_modules="all-linear"))
        >>> plan = evatune.initialize(model, loader, rho=2.0)
        >>> trainer.train()
    """
    fresh = fresh_adapter(peft_model, adapter_name)
    given = isinstance(batches_or_spectra, Spectra)
    _check_options(options, further={"forward": forward, "row_mask": row_mask}, measured=given)
    settings = Measuring.of(options, settings=settings, call="evatune.initialize")  # before minutes of measuring
    _warn_of_eva_config(fresh.config, rho=settings.rho, whiten=whiten)
    spectra = batches_or_spectra
    if not isinstance(spectra, Spectra):
        settings = replace(settings, **Targets().to_json() | fresh.measuring())
        spectra = measure(
            fresh.model, spectra, forward=forward, row_mask=row_mask, progress=progress, settings=settings
        )
    return start(fresh, spectra, settings=settings, whiten=whiten, force=force, warn=given)


def start(
    fresh: Fresh,
    spectra: Spectra,
    *,
    settings: Measuring,
    whiten: bool = False,
    keep_scale: bool = True,
    force: bool = False,
    warn: bool = True,
) -> RankPlan:
    """Start a fresh adapter from spectra; see `initialize`.

    Args:
        fresh: the adapter, which says ranks, alphas and whether A is trained.
        spectra: of its layers, or of more.
        settings: say rho, metric and budget.
        whiten: see `initialize`.
        keep_scale: change each alpha with its rank.
        force: see `initialize`.
        warn: whether to warn of layers that no batch reached.
    """
    base = fresh.model.get_base_model()
    spectra = fit_spectra(spectra, fresh.widths, model=base, force=force, warn=warn).spectra
    alphas = fresh.alphas
    plan = spectra.plan(
        rank=fresh.ranks,
        rho=settings.rho,
        metric=settings.metric,
        budget=settings.budget,
        lora_alpha=alphas,
        use_rslora=fresh.config.use_rslora,
        train_a=fresh.trains_a,
    )
    if not keep_scale:
        plan = replace(plan, alphas={name: float(alphas[name]) for name in plan.ranks})
    down = {
        name: eva(spectra[name].components, rank, singular_values=spectra[name].singular_values, whiten=whiten)
        for name, rank in plan.ranks.items()
    }
    with all_or_nothing(fresh.model):
        apply_plan(fresh.model, plan, down=down, adapter_name=fresh.name)
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
    note_plan(model, adapter_name, planned, plan)


def _check_options(options: Mapping[str, Any], *, further: Mapping[str, Any], measured: bool) -> None:
    taken = [name for name in options if name in _FROM_ADAPTER]
    if taken:
        raise EvaError(f"{', '.join(taken)} cannot be given here: the adapter's LoraConfig says it.")
    for_measuring = [name for name in options if name in Measuring.field_names() and name not in _OF_PLAN]
    for_measuring += [name for name, value in further.items() if value is not None]
    if measured and for_measuring:
        raise EvaError(
            f"{', '.join(sorted(for_measuring))}: these options are for measuring, but spectra were given; "
            "leave them out or give batches."
        )


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
