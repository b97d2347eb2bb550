"""`evatune.prepare`: one function for all methods."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from evatune.activations.gradients import Loss
from evatune.activations.layers.heads import find_heads
from evatune.activations.layers.targets import TargetModule, TargetRules, find_targets
from evatune.activations.measure import Forward, RowMask
from evatune.activations.preserve import preserved_random_state
from evatune.adapters.all_or_nothing import all_or_nothing
from evatune.adapters.base_change import take_out
from evatune.adapters.factors import COMPUTED, factors_of, is_computed
from evatune.adapters.four_bits import quantize
from evatune.adapters.lora import find_adapter
from evatune.adapters.preparation import Preparation
from evatune.adapters.unloading import (
    check_not_shared,
    copy_biases,
    copy_weights,
    remember,
    trained_names,
)
from evatune.adapters.wrap import wrap
from evatune.allocation import RankPlan
from evatune.errors import EvaError
from evatune.methods import Choice, at_home, check_takes_plan, check_train_a, parse_method
from evatune.settings import Adapter, Gradients, Measuring, Preparing, takes
from evatune.spectra import Spectra


@takes(Preparing)
def prepare(
    model: Any,
    *,
    method: str = "eva",
    rank: int = 16,
    batches: Iterable[Any] | Spectra | None = None,
    spectra: Spectra | None = None,
    plan: RankPlan | None = None,
    total_steps: int | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    row_mask: RowMask | None = None,
    modules_to_save: Sequence[str] | None = None,
    task_type: str | None = None,
    keep_base: bool = True,
    force: bool = False,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Make a model ready for fine-tuning by any method.

    The heads of classifiers are new and are trained whole, whatever the task type says (docs/measuring.md). Methods
    that start from A and B with B A ≠ 0 subtract that product from the base weights, so that the first outputs are the
    base model's. LoRA-One is the exception: its start is meant as a gradient step. Save such models with
    `evatune.adapters.save_adapter`, which writes an adapter for the untouched base model, and take the adapter off with
    `evatune.adapters.unload`.

    Args:
        model: a torch model without adapter; it is changed in place, as PEFT does.
        method: a name from `evatune.methods.METHODS`, with options behind a plus: `eva+dora`, `pissa+rslora`.
        rank: rank of every target before redistribution; AdaLoRA's final average.
        batches: data for the data-driven methods, as the model takes it (with labels for lora-ga, lora-one and
            eva-grad); iterated once. Spectra may be given here too.
        spectra: measured before, of these targets or of more; then nothing is measured.
        plan: ranks and alphas of the targets, decided before, for the methods that redistribute ranks; then rank, rho,
            metric and budget decide nothing.
        total_steps: how many optimizer steps the training will take; AdaLoRA's schedule needs it.
        loss: computes the loss from model and batch; needed if the loss of the model itself does not fit.
        forward: calls the model with a batch while measuring; needed if the default does not fit.
        row_mask: says which rows count while measuring, see `evatune.measure`.
        modules_to_save: names of further modules that are trained and saved whole, and get no adapter.
        task_type: PEFT's task type.
        keep_base: keep the base weights that a method changes in main memory, so that `unload` can put them back.
        force: take spectra that were measured on another model.
        progress: show a bar while measuring.
        options: see the list below. Those of `measure` are for methods that measure.

    Returns:
        The PEFT model; for `full` the model itself, all parameters trainable.

    Raises:
        EvaError: an unknown method or a combination without meaning, missing batches or steps, spectra of another
            model, no matching target, or a value out of range. After any error the model is as it was before.

    Cost: see the page of each method in `docs/methods`.

    Example:
        >>> model = evatune.prepare(base, method="eva+dora", rank=16, batches=loader)  # doctest: +SKIP
    """
    choice = parse_method(method)
    _check_method(choice, options)
    given = dict(choice.method.measuring) | options | {"method": method, "rank": rank}
    settings = Preparing.of(given, call="evatune.prepare")
    if isinstance(batches, Spectra):
        batches, spectra = None, batches
    _check_model(model)
    _check_data(choice, batches, spectra)
    if plan is not None:
        check_takes_plan(choice)
    check_train_a(choice, train_a=settings.train_a)
    if not choice.method.has_adapter:
        return model.requires_grad_(True)
    with all_or_nothing(model) as before, preserved_random_state():
        torch.manual_seed(settings.seed)
        targets, whole = _targets(model, choice, settings, modules_to_save)
        config = _config(choice, settings, whole=whole, task_type=task_type, total_steps=total_steps)
        originals = copy_weights(model, _changing(choice, targets))
        before.let_go({model.get_parameter(name): copy for name, copy in originals.items()})
        if settings.bias != "none":
            originals |= copy_biases(model)
        trainable = trained_names(model)
        if choice.in_four_bits:
            quantize(model, targets)
            targets = _without(find_targets(model, settings.part(TargetRules)), whole)
        preparation = Preparation(
            model=model,
            targets=targets,
            config=config,
            settings=settings,
            batches=batches,
            spectra=spectra,
            plan=plan,
            loss=loss,
            forward=forward,
            row_mask=row_mask,
            force=force,
            progress=progress,
        )
        peft_model = _started(choice, preparation)
        if choice.method.changes_base:
            take_out(peft_model, originals, method=choice.method.name)
        remember(peft_model, originals=originals if keep_base else None, trainable=trainable)
        _set_trained(peft_model, settings)
    return peft_model


def _started(choice: Choice, preparation: Preparation) -> Any:
    """Return the PEFT model, whose adapter starts as the method says."""
    method = choice.method
    finish = at_home(method.start)(preparation, **method.options) if method.start else None
    with _peft_errors(choice), _quiet_corrections():
        peft_model = wrap(preparation.model, preparation.config, preparation.targets)
    if finish is not None:
        finish(peft_model)
    return peft_model


def _config(
    choice: Choice,
    settings: Preparing,
    *,
    whole: list[str],
    task_type: str | None,
    total_steps: int | None,
    starts: bool = True,
) -> Any:
    """Return the PEFT configuration, without targets.

    Args:
        choice: the method.
        settings: all options.
        whole: the modules that are trained whole.
        task_type: PEFT's task type.
        total_steps: how many optimizer steps the training will take.
        starts: whether PEFT is to compute the start, if it is PEFT's.
    """
    left_out = () if starts else ("init_lora_weights",)
    with _peft_errors(choice):
        return at_home(choice.method.config)(
            settings.part(Adapter),
            settings={name: value for name, value in choice.settings.items() if name not in left_out},
            common={"modules_to_save": whole or None, "task_type": task_type, "bias": settings.bias},
            total_steps=total_steps,
            seed=settings.seed,
        )


def _set_trained(peft_model: Any, settings: Preparing) -> None:
    """Freeze `A` and change the dtype of what is trained, if the settings say so."""
    if not settings.train_a:
        freeze_a(peft_model)
    hold_in(peft_model, settings.adapter_dtype)


@takes(Preparing)
def adapter_shapes(
    model: Any,
    *,
    total_steps: int | None = None,
    modules_to_save: Sequence[str] | None = None,
    task_type: str | None = None,
    **options: Any,
) -> tuple[Any, list[TargetModule]]:
    """Return the model that `prepare` would give, without a start, for a model without values; and the targets.

    All ranks are the recipe's, no weight is computed and none is held in 4 bits.

    Args:
        model: on the meta device; it is changed in place.
        total_steps: as in `prepare`.
        modules_to_save: as in `prepare`.
        task_type: as in `prepare`.
        options: see the list below.

    Raises:
        EvaError: what `prepare` would raise about settings and targets.
    """
    settings = Preparing.of(options, call="evatune.adapters.adapter_shapes")
    choice = parse_method(settings.method)
    check_train_a(choice, train_a=settings.train_a)
    if not choice.method.has_adapter:
        return model.requires_grad_(True), []
    targets, whole = _targets(model, choice, settings, modules_to_save)
    config = _config(choice, settings, whole=whole, task_type=task_type, total_steps=total_steps, starts=False)
    with _peft_errors(choice), _quiet_corrections(), preserved_random_state():
        peft_model: Any = wrap(model, config, targets)
    for name, parameter in peft_model.named_parameters():
        # PEFT loses that AdaLoRA's count of ranks is not trained where it moves it to another device.
        if ".ranknum." in name:
            parameter.requires_grad_(False)
    _set_trained(peft_model, settings)
    return peft_model, targets


def hold_in(peft_model: Any, dtype: str) -> None:
    """Hold what is trained in bfloat16, if `dtype` says so; float32 is as PEFT makes it."""
    if dtype != "bfloat16":
        return
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def freeze_a(peft_model: Any, adapter_name: str = "default") -> None:
    """Train `B` only; `A` stays as it started. A saved adapter does not record this: freeze again after loading.

    Args:
        peft_model: the model that carries the adapter.
        adapter_name: the adapter.

    Raises:
        EvaError: no LoRA adapter of that name, or an `A` that is zero, so that `B` would never learn.
    """
    _, _, layers = find_adapter(peft_model, adapter_name)
    frozen = []
    for name, layer in layers.items():
        for pair in factors_of(layer, adapter_name):
            weight = pair.down_weight
            if not weight.is_meta and not weight.any():
                raise EvaError(
                    f"A of {name!r} is zero, as PEFT starts it on embeddings; frozen, it would keep B from learning: "
                    "start from a method that fills it, such as eva, or leave the module out with exclude_modules."
                )
            frozen.append(weight)
    for weight in frozen:
        weight.requires_grad_(False)


_MEASURING = set(Measuring.field_names()) - set(Adapter.field_names()) - set(Gradients.field_names()) - {"seed"}
"""Options that say how to measure, and nothing else."""


def _check_method(choice: Choice, options: Mapping[str, Any]) -> None:
    """Check that a method has a use for the options of measuring that were given."""
    useless = sorted(_MEASURING.intersection(options))
    if useless and not choice.method.needs_batches:
        raise EvaError(f"{', '.join(useless)} cannot be given: method {choice.name!r} measures nothing.")


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise EvaError(f"a torch model is needed, got {type(model).__name__}.")
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise EvaError("the model has an adapter already; give evatune.prepare the base model.")


def _check_data(choice: Choice, batches: Any, spectra: Spectra | None) -> None:
    method = choice.method
    if spectra is not None and not method.needs_spectra:
        raise EvaError(f"method {choice.name!r} has no use for spectra; leave them out.")
    if method.needs_batches and batches is None and spectra is None:
        what = "batches or spectra" if method.needs_spectra else "batches"
        raise EvaError(f"method {choice.name!r} looks at data before training: pass {what} (batches=loader).")


def _targets(
    model: nn.Module, choice: Choice, settings: Preparing, modules_to_save: Sequence[str] | None
) -> tuple[list[TargetModule], list[str]]:
    """Return what a method adapts, and the names of the modules that are trained whole.

    Raises:
        EvaError: the method cannot adapt one of the targets.
    """
    rules = settings.part(TargetRules)
    targets = find_targets(model, rules)
    whole = [*dict.fromkeys([*(modules_to_save or ()), *_new_heads(model, rules, targets)])]
    targets = _without(targets, whole)
    _check_targets(choice, targets, settings)
    check_not_shared(model, _changing(choice, targets))
    return targets, whole


def _check_targets(choice: Choice, targets: Sequence[TargetModule], settings: Preparing) -> None:
    """Check everything about the targets that can be checked before the model is changed."""
    method, needed = choice.method, choice.method.vectors * settings.rank
    for target in targets:
        kind = type(target.module)
        if method.layers and (target.parameter or not {base.__name__ for base in kind.__mro__} & set(method.layers)):
            raise EvaError(
                f"method {choice.name!r} works on linear layers, and {target.name!r} is a "
                f"{'parameter of a ' if target.parameter else ''}{kind.__name__}, which it cannot adapt; leave it out "
                "with exclude_modules, or take another method."
            )
        if is_computed(target.module):
            raise EvaError(COMPUTED.format(name=target.name))
        smaller = min(target.in_features, target.out_features)
        if needed > smaller:
            raise EvaError(
                f"rank {settings.rank} is too large for method {choice.name!r} on {target.name!r}: it takes {needed} "
                f"singular vectors of {smaller}; take a smaller rank or leave the module out with exclude_modules."
            )
        if target.parameter and settings.lora_dropout:
            raise EvaError(
                f"lora_dropout={settings.lora_dropout:g} is impossible on {target.name!r}, where PEFT adds the adapter "
                "to the weights; take lora_dropout=0, or leave it out with exclude_modules."
            )


def _new_heads(model: nn.Module, rules: TargetRules, targets: Sequence[TargetModule]) -> list[str]:
    """Return the new heads that are trained whole: those that are neither targets nor excluded."""
    names = [target.name for target in targets]
    return [
        head
        for head, is_new in find_heads(model).items()
        if is_new and not rules.excludes(head) and not any(f"{name}.".startswith(f"{head}.") for name in names)
    ]


def _without(targets: Sequence[TargetModule], whole: Sequence[str]) -> list[TargetModule]:
    """Return the targets outside of the modules that are trained whole, by PEFT's rule for these names."""
    trained = re.compile("|".join(rf"(.*\.)?{re.escape(name)}(\..*)?" for name in whole) or "(?!)")
    left = [target for target in targets if not trained.fullmatch(target.name)]
    if not left:
        raise EvaError(f"all targets are parts of what is trained whole ({', '.join(whole)}); name others as well.")
    return left


def _changing(choice: Choice, targets: Sequence[TargetModule]) -> list[str]:
    """Return the base weights whose numbers change: the method changes them, or PEFT does so in attention modules.

    In every pass PEFT adds the adapter of an attention module to its weights and subtracts it again, with rounding.
    """
    names = [f"{target.name}.weight" for target in targets if choice.method.changes_base]
    for target in targets:
        if isinstance(target.module, nn.MultiheadAttention):
            names += [f"{target.name}.in_proj_weight", f"{target.name}.out_proj.weight"]
    return names


@contextlib.contextmanager
def _peft_errors(choice: Choice) -> Iterator[None]:
    try:
        yield
    except EvaError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise EvaError(f"PEFT cannot do {choice.name!r} here: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _quiet_corrections() -> Iterator[None]:
    """Silence PEFT's warnings of settings that it corrects itself, such as the layout of GPT-2's Conv1D."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Failed to load the CUDA extension")  # BOFT's, in each layer
        warnings.filterwarnings("ignore", message="Setting boft_n_butterfly_factor to 1")
        yield
