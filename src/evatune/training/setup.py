"""The steps from a recipe to an adapter that is ready for training; `finetune` and the command line share them."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from evatune import launch
from evatune.activations import measure
from evatune.activations.gradients import batch_loss
from evatune.activations.layers.targets import TargetRules, find_targets
from evatune.adapters import initialized_plan, prepare
from evatune.adapters.attach import load_adapter, quiet_peft
from evatune.adapters.fit import check_has_no_others
from evatune.adapters.four_bits import quantize_targets
from evatune.adapters.prepare import freeze_a, hold_in
from evatune.allocation import RankPlan
from evatune.hardware import autocast, best_device
from evatune.pca.products import has_fast_bfloat16
from evatune.recipe import Recipe, TrainSettings
from evatune.settings import Adapter, Reason, Targets
from evatune.spectra import Spectra
from evatune.tasks import open_task
from evatune.tasks.task import Needs, Task, batches


def uses_bf16(settings: TrainSettings) -> bool:
    """Return whether to compute in bfloat16 autocast: as the settings say; `auto` means if it is fast here."""
    return settings.precision == "bf16" or (settings.precision == "auto" and has_fast_bfloat16(best_device().type))


def use_threads(recipe: Recipe) -> None:
    """Set the number of processor threads, if the recipe gives one."""
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)


def open_recipe(recipe: Recipe, *, offline: bool = False) -> Task:
    """Return the recipe's task; `offline` asks no hub."""
    return open_task(recipe.task, recipe.data, model=recipe.model, seed=recipe.train.seed, offline=offline)


def load_base(recipe: Recipe, task: Task, *, quantizes: bool = False) -> Any:
    """Return the task's model on this machine's best device; the seed is set first, since heads may be new.

    Args:
        recipe: which model.
        task: loads it.
        quantizes: `quantize_as_asked` comes next, so a model that does not fit on the device may wait for it.
    """
    set_seed(recipe.train.seed)
    model = task.load_model()
    return model if quantizes and recipe.adapter.choice.in_four_bits else model.to(best_device())


def measured_batches(recipe: Recipe, task: Task, *, part: tuple[int, int] = (0, 1)) -> Any:
    """Return a loader of the batches that are measured, drawn as the recipe says; `part` as for `batches`."""
    measure, seed = recipe.measure, recipe.train.seed
    return batches(task, batch_size=measure.batch_size, seed=seed, sampling=measure.sampling, part=part)


def planned(recipe: Recipe) -> tuple[Recipe, RankPlan | None]:
    """Return the recipe with the settings of the plan that it names, and the plan; None if it names none.

    Raises:
        EvaError: the file is missing or holds no plan.
    """
    if recipe.adapter.plan is None:
        return recipe, None
    plan = RankPlan.load(recipe.adapter.plan)
    recipe = replace(recipe, adapter=replace(recipe.adapter, **plan.settings()))
    most = max(plan.ranks.values(), default=0)
    if most > recipe.measuring.n_kept:
        recipe = replace(recipe, measure=replace(recipe.measure, n_components=most))
    return recipe, plan


def measure_recipe(
    recipe: Recipe,
    model: torch.nn.Module,
    *,
    task: Task,
    plan: RankPlan | None = None,
    progress: bool = True,
) -> Spectra:
    """Measure a model on training data as a recipe says; several processes share the batches.

    Args:
        recipe: see `Recipe.measuring`.
        model: the base model.
        task: has the training data.
        plan: ranks that were decided before; they are looked at first, since measuring may take long.
        progress: show a bar, if standard error is a terminal.

    Raises:
        EvaError: the plan is of another model, or what `measure` raises.
    """
    needs, number, n_processes = task.needs(model), launch.number(), launch.n_processes()
    settings = replace(recipe.measuring, exclude_modules=without_adapter(recipe, needs))
    if plan is not None:
        targets = {target.name for target in find_targets(model, settings.part(TargetRules))}
        check_has_no_others(plan, targets, plan_name=str(recipe.adapter.plan))
    share = range(number, settings.max_batches, n_processes)
    return measure(
        model,
        itertools.islice(measured_batches(recipe, task, part=(number, n_processes)), len(share)),
        row_mask=needs.learned_mask if settings.use_label_mask and needs.learned_mask else needs.row_mask,
        settings=settings,
        max_batches=math.ceil(settings.max_batches / n_processes),
        progress=progress and sys.stderr.isatty(),
    )


def without_adapter(recipe: Recipe, needs: Needs) -> str | Sequence[str] | None:
    """Return which modules stay without adapter: those that the recipe excludes, and the task's new heads."""
    excluded, names = recipe.adapter.exclude_modules, (*needs.heads, *needs.without_adapter)
    if not names:
        return excluded
    parts = [rf"(.*\.)?{re.escape(name)}(\..*)?" for name in names]
    if isinstance(excluded, str):
        parts.append(f"({excluded})")
    else:
        parts += [rf"(.*\.)?{re.escape(name)}" for name in excluded or ()]
    return "|".join(parts)


def quantize_as_asked(recipe: Recipe, model: torch.nn.Module, needs: Needs) -> None:
    """Quantize the targets to 4 bits if the method has `qlora`, so that the measured model is the trained one.

    Each weight goes to the device alone, so that the whole model need not fit there before.
    """
    if recipe.adapter.choice.in_four_bits:
        targets = recipe.adapter.shared(Targets) | {"exclude_modules": without_adapter(recipe, needs)}
        quantize_targets(model, device=best_device(), **targets)
        model.to(best_device())


def is_interrupted(spectra: Spectra) -> bool:
    """Return whether Ctrl-C ended the measurement."""
    return any(spectrum.stopped == Reason.INTERRUPTED for spectrum in spectra.inputs.values())


def measures(recipe: Recipe) -> bool:
    """Return whether the recipe's method starts from spectra that were given or that `measure_recipe` can measure.

    Methods that need all components are measured by `prepare`: so many components are not saved with a run.
    """
    method = recipe.adapter.choice.method
    return method.needs_spectra and (not method.needs_all_components or recipe.measure.spectra is not None)


def new_adapter(
    recipe: Recipe,
    model: Any,
    spectra: Spectra | None,
    *,
    task: Task,
    plan: RankPlan | None = None,
    total_steps: int | None = None,
    force: bool = False,
) -> tuple[Any, RankPlan | None]:
    """Make a model ready for training by the recipe's method.

    Args:
        recipe: its section `adapter` is used, and the seed.
        model: the base model; it is changed in place, as PEFT does.
        spectra: measured on the same targets, for the methods that start from them.
        task: has the training data, for the methods that look at data otherwise, and says what needs no adapter.
        plan: ranks that were decided before.
        total_steps: optimizer steps to come.
        force: take spectra that were measured on another model.

    Returns:
        The PEFT model, or the model itself for full fine-tuning, and the plan, which is None for uniform ranks.
    """
    method, needs = recipe.adapter.choice.method, task.needs(model)
    options = recipe.adapter.shared(Adapter) | {"exclude_modules": without_adapter(recipe, needs)}
    if method.needs_batches and (spectra is None or method.needs_gradients):
        options["batches"] = measured_batches(recipe, task)
        if not method.needs_spectra:
            options["max_batches"] = recipe.measure.max_batches
        elif spectra is None:
            options |= {"max_batches": recipe.measure.max_batches, "center": recipe.measure.center, "progress": False}
            options |= {"row_mask": needs.row_mask}
    set_seed(recipe.train.seed)
    adapted = prepare(
        model,
        spectra=spectra,
        plan=plan,
        total_steps=total_steps,
        gradient_batches=recipe.measure.gradient_batches,
        loss=_autocast_loss if uses_bf16(recipe.train) else None,
        modules_to_save=needs.heads or None,
        task_type=needs.task_type,
        keep_base=False,
        force=force,
        seed=recipe.train.seed,
        **options,
    )
    return adapted, initialized_plan(adapted) if method.needs_spectra else None


def checkpoint_gradients(model: Any) -> None:
    """Let a model compute its activations twice, which saves memory."""
    with quiet_peft():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()  # without it, no gradient reaches the adapters through frozen embeddings
    model.config.use_cache = False


def resumed_adapter(recipe: Recipe, model: Any, directory: str | Path, *, task: Task) -> Any:
    """Return the model with the saved initial adapter, whose weights a checkpoint then replaces."""
    if not recipe.adapter.choice.method.has_adapter:
        return model.requires_grad_(True)
    quantize_as_asked(recipe, model, task.needs(model))
    adapted = load_adapter(model, directory, is_trainable=True)
    if not recipe.adapter.train_a:
        freeze_a(adapted)
    hold_in(adapted, recipe.adapter.adapter_dtype)
    return adapted


def _autocast_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    with autocast(best_device(), "bfloat16"):
        return batch_loss(model, batch)
