"""Scoring a finished run, or any model and adapter, on the held-out data of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evatune.adapters.attach import load_adapter
from evatune.errors import EvaError
from evatune.recipe import Recipe, load_recipe
from evatune.tasks.scores import Scores
from evatune.training.folder import ADAPTER, MODEL, RECIPE
from evatune.training.origin import check_model
from evatune.training.setup import load_base, open_recipe, quantize_as_asked, use_threads, uses_bf16


def saved_run(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> tuple[Recipe, Path | None]:
    """Return what a finished run made, as `evaluate` takes it.

    Args:
        folder: the run's folder.
        overrides: settings that differ from the run's recipe, as for `load_recipe`.

    Returns:
        The recipe, and the folder of the adapter; after full fine-tuning the recipe's model is the trained one instead.

    Raises:
        EvaError: the folder holds no finished run.
    """
    folder = Path(folder).expanduser()
    if not (folder / RECIPE).is_file():
        raise EvaError(
            f"{folder} holds no run: it has no {RECIPE}; with --adapter, --model and --recipe any adapter is evaluated."
        )
    recipe = load_recipe(folder / RECIPE, overrides)
    if (folder / ADAPTER).is_dir():
        return recipe, folder / ADAPTER
    if (folder / MODEL).is_dir():
        return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, name=str(folder / MODEL))), None
    raise EvaError(f"the run in {folder} is not finished; go on with evatune finetune --resume --output {folder}.")


def evaluate(
    recipe: Recipe,
    *,
    adapter: str | Path | None = None,
    limit: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> Scores:
    """Score a model on a recipe's held-out data.

    Args:
        recipe: its task, model, held-out data and precision are used.
        adapter: folder of an adapter that is put on the model; None scores the model as it is.
        limit: score the first so many held-out examples.
        force: put the adapter also on another model than the one that it was made for.
        progress: show a bar, if standard error is a terminal.

    Raises:
        EvaError: there are no held-out data, no such model, or the adapter does not fit.
    """
    recipe.require("model")
    if limit is not None and limit < 1:
        raise EvaError(f"limit is {limit}, but must be at least 1.")
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise EvaError(f"{adapter} holds no adapter: it has no adapter_config.json.")
    task = open_recipe(recipe)
    if not len(task.held_out):
        raise EvaError("the recipe names no held-out data; set `eval` in its section `data`, or pass --eval.")
    use_threads(recipe)
    model = load_base(recipe, task)
    if adapter is not None:
        if not force:
            check_model(adapter, model)
        quantize_as_asked(recipe, model, task.needs(model))
        model = load_adapter(model, adapter)
    return task.evaluate(model, limit=limit, bf16=uses_bf16(recipe.train), progress=progress)
