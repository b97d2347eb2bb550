"""The runs of a sweep: what each of them is called, its recipe, and what its spectra depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from evatune.compare.sweep import Contender, Sweep, Task
from evatune.errors import EvaError, near_misses
from evatune.files import json_text
from evatune.recipe import Recipe, load_recipe
from evatune.tasks import find_domain
from evatune.tasks.scores import measured_by

StageName = Literal["validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is compared with the others: a method of one rank and rho, on one model and task."""

    task: Task
    model: str | None
    contender: Contender
    rank: int | None
    rho: float | None
    several: frozenset[str]
    """What the names must tell since the sweep has several of it: `model`, `rank`, `rho`."""

    @property
    def label(self) -> str:
        """The method as tables name it: `eva`, or `eva ρ=2 r=8` where there are several."""
        parts = [self.contender.label]
        parts += [f"ρ={self.rho:g}"] if self.rho is not None and "rho" in self.several else []
        parts += [f"r={self.rank}"] if self.rank is not None and "rank" in self.several else []
        return " ".join(parts)

    @property
    def model_label(self) -> str:
        """The model as tables name it; empty where there is one."""
        name = (self.model or "").rstrip("/")
        return name.rpartition("/")[2] if "model" in self.several else ""

    @property
    def folder(self) -> str:
        """Where its runs are, below the folder of the runs."""
        return "/".join(map(_file_name, filter(None, (self.task.name, self.model_label, self.label))))

    @property
    def searches(self) -> bool:
        """Whether there is something to choose on validation data."""
        return any(len(values) > 1 for values in self.contender.grid.values())

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings that differ from the recipe's."""
        own = {"model.name": self.model, "adapter.rank": self.rank, "adapter.rho": self.rho}
        return {
            **self.task.values,
            **{path: value for path, value in own.items() if value is not None},
            **self.contender.values,
        }


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sweep."""

    cell: Cell
    stage: StageName
    point: Mapping[str, Any]
    """The searched settings."""
    seed: int

    @property
    def name(self) -> str:
        """Its name and its folder below that of the runs."""
        searched = "-".join(f"{_short(path)}{_shown(value)}" for path, value in self.point.items())
        return f"{self.cell.folder}/{_file_name(f'{searched}-seed{self.seed}'.lstrip('-'))}"

    @cached_property
    def recipe(self) -> Recipe:
        """What it runs, without output."""
        stage = getattr(self.cell.task, self.stage)
        values = {**self.cell.overrides, **self.point, **stage.values, "train.seed": self.seed, "output": ""}
        return load_recipe(self.cell.task.recipe, values)

    @cached_property
    def spectra_key(self) -> str | None:
        """The same for all runs that measure the same spectra; None if this one measures none, or has them already.

        They depend on the model, the training data and their order, the targets, and how is measured; not on learning
        rates, steps, alpha, options such as DoRA, or how A is made of the components.
        """
        recipe = self.recipe
        method = recipe.adapter.choice.method
        if not method.needs_spectra or method.needs_all_components or recipe.measure.spectra:
            return None
        parts = {
            "task": recipe.task,
            "model": recipe.model.to_json(),
            "data": {key: value for key, value in recipe.data.to_json().items() if "eval" not in key},
            "measuring": recipe.measuring.to_json(),
            "batch": recipe.measure.batch_size,
            "four bits": recipe.adapter.choice.in_four_bits,
        }
        return hashlib.sha256(json_text(parts).encode()).hexdigest()[:16]

    def recipe_in(self, folder: Path, *, spectra: Path | None, threads: int) -> Recipe:
        """Return the recipe with its output, the spectra that were measured before, and the threads."""
        recipe = dataclasses.replace(self.recipe, output=str(folder))
        if spectra is not None:
            recipe = dataclasses.replace(recipe, measure=dataclasses.replace(recipe.measure, spectra=str(spectra)))
        return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, threads=threads))


def cells(sweep: Sweep) -> list[Cell]:
    """Return everything that is compared, in the order of the sweep.

    Raises:
        EvaError: two have one name, a recipe cannot be read, a task would be scored on the same examples in both
            stages, the untuned model would not be scored, a searched value is not allowed, or the runs cannot have the
            sweep's metric.
    """
    several = frozenset(name for name in ("model", "rank", "rho") if len(getattr(sweep, f"{name}s")) > 1)
    found: list[Cell] = []
    for task, model, contender in itertools.product(sweep.tasks, sweep.models or (None,), sweep.contenders):
        method = contender.choice.method
        ranks = sweep.ranks if method.has_adapter and "adapter.rank" not in contender.values else ()
        rhos = sweep.rhos if method.needs_spectra and "adapter.rho" not in contender.values else ()
        for rank, rho in itertools.product(ranks or (None,), rhos or (None,)):
            found.append(Cell(task=task, model=model, contender=contender, rank=rank, rho=rho, several=several))
    folders = [cell.folder for cell in found]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise EvaError(f"two runs of the sweep have one name, {twice}; give recipes, models and methods other names.")
    for cell in found:
        _check_stages(cell, metric=sweep.metric)
        _check_grid(cell)
    return found


def runs_of(cell: Cell, stage: StageName, point: Mapping[str, Any]) -> list[Run]:
    """Return the runs of a setting, one for each seed of the stage."""
    seeds = getattr(cell.task, stage).seeds
    return [Run(cell=cell, stage=stage, point=point, seed=seed) for seed in seeds]


def points(grid: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return every combination of the values of a grid; one empty combination if nothing is searched."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _check_stages(cell: Cell, *, metric: str | None) -> None:
    """Check that choosing sees no example that is reported, and that runs can have the scores that are asked for."""
    point = points(cell.contender.grid)[0]
    validation, test = (runs_of(cell, stage, point)[0].recipe for stage in ("validation", "test"))
    if not test.model.name:
        raise EvaError(f"{cell.task.recipe} names no model; set `model` in it, or `models` in the sweep.")
    if not all(getattr(test.data, name) for name in find_domain(test.task).required):
        raise EvaError(f"{cell.task.recipe} names no training data; set `data` in it, or `train` under `settings`.")
    if cell.searches and validation.data == test.data and not find_domain(test.task).fresh_held_out:
        raise EvaError(
            f"recipe {cell.task.name!r} scores the same held-out examples to choose and to report; say what differs "
            "under `validation:`, such as `eval: FILE`, or `validate: true`."
        )
    if not test.train.eval_before:
        raise EvaError(
            f"the test runs of recipe {cell.task.name!r} have eval_before: false, but the results state the untuned "
            "model's scores; set it under `validation:` only."
        )
    for recipe in (validation, test):
        known = find_domain(recipe.task).metrics(recipe.data)
        if metric is not None and measured_by(metric) not in known:
            raise EvaError(
                f"metric is {metric!r}{near_misses(metric, known)}, but the runs of recipe {cell.task.name!r} (task "
                f"{recipe.task!r}) can have {', '.join(known)}."
            )


def _check_grid(cell: Cell) -> None:
    """Check that a run may have every value that is searched, which one at a time tells."""
    first = points(cell.contender.grid)[0]
    for path, values in cell.contender.grid.items():
        for value in values[1:]:
            _ = runs_of(cell, "validation", first | {path: value})[0].recipe


def _short(path: str) -> str:
    """Return a short name of a setting for names of folders."""
    return {"train.learning_rate": "lr"}.get(path, path.rpartition(".")[2].replace("_", "-") + "-")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _file_name(text: str) -> str:
    """Return a text as the name of a file: `eva ρ=2` becomes `eva-rho2`."""
    return re.sub(r"[^\w.+-]+", "-", text.replace("ρ=", "rho").replace("=", "")).strip("-")
