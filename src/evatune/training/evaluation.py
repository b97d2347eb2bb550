"""Scoring a finished run, or any model and adapter, on the held-out data of a recipe."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evatune import launch
from evatune.adapters.attach import load_adapter
from evatune.errors import EvaError
from evatune.files import check_writable, write_json_lines
from evatune.methods import at_home
from evatune.recipe import Recipe, load_recipe
from evatune.tasks import DOMAINS, find_domain
from evatune.tasks.journal import Journal
from evatune.tasks.scores import Scores
from evatune.tasks.task import Task
from evatune.training.folder import ADAPTER, MODEL, RECIPE, RECORD
from evatune.training.origin import check_model, content_hash, data_of
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
    if not (folder / RECORD).is_file():  # a run that is made longer still has the adapter of its old end
        raise EvaError(f"the run in {folder} is not finished; go on with evatune finetune --resume --output {folder}.")
    recipe = load_recipe(folder / RECIPE, overrides)
    if (folder / ADAPTER).is_dir():
        return recipe, folder / ADAPTER
    trained = dataclasses.replace(recipe.model, name=str(folder / MODEL), gguf_file=None, revision=None)
    return dataclasses.replace(recipe, model=trained), None


def evaluate(
    recipe: Recipe,
    *,
    adapter: str | Path | None = None,
    limit: int | None = None,
    force: bool = False,
    outcomes: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Scores:
    """Score a model on a recipe's held-out data.

    Args:
        recipe: its task, model, held-out data and precision are used.
        adapter: folder of an adapter that is put on the model; None scores the model as it is.
        limit: score the first so many held-out examples.
        force: put the adapter also on another model than the one that it was made for.
        outcomes: file of JSON lines for what each example was: question, expected, given, right. While the evaluation
            is on its way, what is known so far is in a file beside it that ends in `.part`.
        resume: go on with this file, if there is one.
        overwrite: replace `outcomes` if it exists.
        progress: show a bar with the time left, if standard error is a terminal.

    Raises:
        EvaError: there are no held-out data, no such model, the adapter does not fit, or the task keeps no outcomes.
    """
    recipe.require("model")
    if limit is not None and limit < 1:
        raise EvaError(f"limit is {limit}, but must be at least 1.")
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise EvaError(f"{adapter} holds no adapter: it has no adapter_config.json.")
    if resume and outcomes is None:
        raise EvaError("--resume needs --outcomes, the file to go on with; name it, or leave out --resume.")
    if outcomes is not None:
        check_tells_examples(recipe)
        check_writable(outcomes, overwrite=overwrite)
        _check_part(_part(outcomes), resume=resume or overwrite)
    task = open_recipe(recipe)
    if not len(task.held_out):
        raise EvaError("the recipe names no held-out data; set `eval` in its section `data`, or pass --eval.")
    use_threads(recipe)
    model = _scored_model(recipe, task, adapter=adapter, force=force)
    options: dict[str, Any] = {"limit": limit, "bf16": uses_bf16(recipe.train), "progress": progress}
    if outcomes is None or not launch.is_first():
        return task.evaluate(model, **options)
    part, about = _part(outcomes), _about(recipe, adapter=adapter, limit=limit)
    try:
        with Journal.open(part, about=about, resume=resume) as journal:
            scores = task.evaluate(model, **options | {"journal": journal})
    except KeyboardInterrupt:
        if progress:
            print(f"stopped   what was scored is in {part}; go on with --resume", file=sys.stderr)
        raise
    write_json_lines(outcomes, scores.examples)
    part.unlink()
    return scores


def check_tells_examples(recipe: Recipe) -> None:
    """Check that the recipe's task tells question and answer of each example.

    Raises:
        EvaError: it does not.
    """
    if not find_domain(recipe.task).keeps_journal:
        raise EvaError(f"task {recipe.task!r} does not tell what each example was; leave out --outcomes and --page.")


def _part(outcomes: str | Path) -> Path:
    """Return the file of what is known so far."""
    path = Path(outcomes).expanduser()
    return path.with_name(path.name + ".part")


def _check_part(part: Path, *, resume: bool) -> None:
    if part.exists() and not resume:
        raise EvaError(f"{part} is of an evaluation that was stopped; go on with --resume, or replace it: --overwrite.")


def _about(recipe: Recipe, *, adapter: str | Path | None, limit: int | None) -> dict[str, Any]:
    """Return what tells one evaluation from another."""
    weights = sorted(Path(adapter).glob("adapter_model.*")) if adapter is not None else []
    return {
        "task": recipe.task,
        "model": recipe.model.to_json(),
        "data": recipe.data.to_json(),
        "files": data_of(recipe),
        "seed": recipe.train.seed,
        "limit": limit,
        "precision": recipe.train.precision,
        "adapter": [content_hash(path) for path in weights],
    }


def evaluate_with_harness(
    recipe: Recipe,
    names: Sequence[str],
    *,
    adapter: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Score the recipe's model on tasks of lm-evaluation-harness; its data need not be named.

    Args:
        recipe: names the model.
        names: of tasks of lm-eval, those with the paper's prompts included (`evatune_commonsense`).
        adapter: folder of an adapter that is put on the model.
        limit: score the first so many examples of each task.
        num_fewshot: examples in front of each question; by default what the task says.
        force: put the adapter also on another model than its own.

    Returns:
        What lm-eval found, as plain values: `results`, `samples`, ...

    Raises:
        EvaError: lm-eval is not installed, or knows no such task, or the recipe's task has no such models.
    """
    recipe.require("model")
    home = find_domain(recipe.task).harness
    if not home:
        able = ", ".join(name for name, domain in DOMAINS.items() if domain.harness)
        raise EvaError(f"lm-eval scores no models of task {recipe.task!r}; it scores those of {able}.")
    use_threads(recipe)
    task = open_recipe(recipe)
    model = _scored_model(recipe, task, adapter=adapter, force=force)
    return at_home(home)(task, model, names, limit=limit, num_fewshot=num_fewshot, bf16=uses_bf16(recipe.train))


def _scored_model(recipe: Recipe, task: Task, *, adapter: str | Path | None, force: bool) -> Any:
    task.check_saved(Path(recipe.model.name if adapter is None else adapter).expanduser())
    model = load_base(recipe, task, quantizes=adapter is not None)
    if adapter is None:
        return model
    if not force:
        check_model(adapter, model)
    quantize_as_asked(recipe, model, task.needs(model))
    return load_adapter(model, adapter)


def harness_rows(found: dict[str, Any]) -> list[list[Any]]:
    """Return task, metric, score and standard error of what a harness found, groups last."""
    rows = []
    for task, metrics in (found["results"] | found.get("groups", {})).items():
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if filtered and not name.endswith("_stderr") and isinstance(value, int | float):
                error = metrics.get(f"{name}_stderr,{filtered}")
                shown = name if filtered == "none" else key
                rows.append([task, shown, float(value), None if error == "N/A" else error])
    return rows
