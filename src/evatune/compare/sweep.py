"""The file of a sweep: which recipes, methods and settings are compared, and what is searched for each of them."""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from evatune.errors import EvaError, near_misses
from evatune.methods import Choice, parse_method
from evatune.recipe import all_settings, find_setting, read_yaml
from evatune.settings import Section, convert, number

Values = Mapping[str, Any]
"""Settings of a recipe by their dotted path."""

FIRST_VALIDATION_SEED = 1000
"""No seed may be of both stages, so that neither data order nor new heads were chosen for the runs on test data."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The runs on validation data, or those on test data."""

    values: Values
    """Settings of these runs alone, such as the held-out data."""
    seeds: tuple[int, ...]
    """One run of each setting with each seed."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One recipe of a sweep."""

    name: str
    """What the sweep calls it."""
    recipe: Path
    """Its file."""
    values: Values
    """Settings that differ from the recipe's."""
    validation: Stage
    test: Stage
    group: str = ""
    """Tables show the mean over the tasks of a group."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One method of a sweep."""

    label: str
    """What the sweep calls it."""
    choice: Choice
    """The method."""
    values: Values
    """Settings that it always has."""
    grid: Mapping[str, tuple[Any, ...]]
    """Values to search, by setting."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Section):
    """Everything that is compared, as a YAML file says it.

    Settings have the names of the command line (`learning_rate`, `train.batch_size`). In `methods` and `search`, a list
    is searched: its best value is chosen by the scores on validation data.
    """

    recipes: Mapping[str, object] = field(default_factory=dict)
    """The tasks: recipe files by name; in place of a file also `recipe`, `settings`, `validation`, `test`, `group`."""
    models: tuple[str, ...] = ()
    """Models to compare; by default each recipe's own."""
    methods: Mapping[str, object] = field(default_factory=dict)
    """The methods, each with settings of its own; a name that is no method has one under `method`."""
    ranks: tuple[int, ...] = ()
    """Ranks to compare; by default each recipe's own."""
    rhos: tuple[float, ...] = ()
    """Values of rho to compare, for the methods that redistribute ranks; by default each recipe's own."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates to search, for methods that have none of their own."""
    search: Mapping[str, object] = field(default_factory=dict)
    """What else is searched, for all methods: lists by setting."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Settings of all runs."""
    validation: Mapping[str, object] = field(default_factory=dict)
    """Settings of the runs on validation data; `seeds` are a count or a list (default: 1)."""
    test: Mapping[str, object] = field(default_factory=dict)
    """Settings of the runs on test data; `seeds` are a count or a list (default: 5)."""
    metric: str | None = None
    """The metric that is compared and chosen by; by default each task's headline."""
    widen: int = number(2, low=0)
    """How often a grid of numbers grows by one value where its best one is at its end; then the end is reported."""
    tries: int = number(3, low=1)
    """How often a run is started whose process dies."""
    keep: Literal["records", "adapters"] = "records"
    """What stays of a run: its record alone, or also the adapters before and after training."""
    output: str = ""
    """Folder of the results."""

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read a sweep; relative paths in it are taken from its own folder.

        Raises:
            EvaError: the file is missing or no YAML, or a key, a type, a setting, a method or a recipe in it is wrong.
        """
        path = Path(path)
        content = read_yaml(path, kind="sweep", holds="keys such as `recipes:` and `methods:`")
        try:
            for key in content:
                if key not in cls.field_names():
                    raise EvaError(f"a sweep has no key {key!r}{near_misses(str(key), cls.field_names())}.")
            content["recipes"] = {
                name: _located(path.parent, given) for name, given in _named(content.get("recipes"), "recipes").items()
            }
            content["methods"] = _named(content.get("methods"), "methods")
            for key in ("recipes", "methods", "settings", "validation", "test"):
                content[key] = _rooted(path.parent, content.get(key) or {})
            output = str(content.get("output") or path.with_suffix("").name)
            sweep = cls(**content | {"output": os.path.normpath(path.parent / Path(output).expanduser())})
            sweep = replace(sweep, models=tuple(_local(path.parent, name) for name in sweep.models))
            for needed in ("recipes", "methods"):
                if not getattr(sweep, needed):
                    raise EvaError(f"it compares nothing without {needed}; name one at least.")
            _ = sweep.tasks, sweep.contenders  # what is wrong in them is told now
        except EvaError as error:
            raise EvaError(f"{path}: {error}") from None
        return sweep

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks in their order."""
        return tuple(self._task(name, given) for name, given in self.recipes.items())

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """The methods in their order."""
        return tuple(self._contender(label, given) for label, given in self.methods.items())

    def _task(self, name: str, given: Any) -> Task:
        own: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"recipe": given}
        parts = ("recipe", "settings", "validation", "test", "group")
        for key in own:
            if key not in parts:
                raise EvaError(
                    f"recipe {name!r} has no key {key!r}{near_misses(key, parts)}; it has {', '.join(parts)}."
                )
        if not isinstance(own.get("recipe"), str):
            raise EvaError(f"recipe {name!r} names no file; write its path, or `recipe: path` below it.")
        group = own.get("group") or ""
        if not isinstance(group, str):
            raise EvaError(f"the group of recipe {name!r} is {group!r}, but must be one name.")
        task = Task(
            name=name,
            recipe=Path(own["recipe"]),
            values=_plain(self.settings, "settings") | _plain(own.get("settings"), f"settings of {name!r}"),
            validation=_stage(self.validation, own.get("validation"), default=1, first=FIRST_VALIDATION_SEED),
            test=_stage(self.test, own.get("test"), default=5, first=0),
            group=group,
        )
        if both := set(task.validation.seeds) & set(task.test.seeds):
            raise EvaError(
                f"{', '.join(map(str, sorted(both)))} is a seed of validation and of test runs; what was chosen would "
                "have seen it: give the stages different seeds."
            )
        return task

    def _contender(self, label: str, given: Any) -> Contender:
        own = dict(_mapping(given, f"method {label!r}"))
        choice = parse_method(own.get("method", label))
        own["method"] = choice.name
        settings = {find_setting(name).path: value for name, value in own.items()}
        own_grid = {path: _options(path, value) for path, value in settings.items() if _is_searched(path, value)}
        values = {path: value for path, value in settings.items() if path not in own_grid}
        shared = {"train.learning_rate": self.learning_rates} if self.learning_rates else {}
        for name, options in self.search.items():
            path = find_setting(name).path
            if not _is_searched(path, options):
                raise EvaError(f"search of {name!r} is {options!r}, but must be a list of values.")
            shared[path] = _options(path, options)
        grid = {path: options for path, options in (shared | own_grid).items() if path not in values}
        for path, options in grid.items():
            if not options or len(set(options)) < len(options):
                raise EvaError(f"the grid of {path} for method {label!r} is empty or has a value twice.")
        return Contender(label=label, choice=choice, values=values, grid=grid)


def _stage(shared: Any, own: Any, *, default: int, first: int) -> Stage:
    """Return a stage of the settings of all tasks and those of one; `seeds` are a count or a list."""
    values = dict(_mapping(shared, "a stage")) | dict(_mapping(own, "a stage"))
    seeds = values.pop("seeds", default)
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        seeds = range(first, first + seeds)
    if not isinstance(seeds, Sequence) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise EvaError(f"seeds are {seeds!r}, but must be a count of at least 1, or a list of whole numbers.")
    return Stage(values=_plain(values, "a stage"), seeds=tuple(dict.fromkeys(seeds)))


def _plain(given: Any, name: str) -> dict[str, Any]:
    """Return settings by their dotted paths."""
    return {find_setting(str(key)).path: value for key, value in _mapping(given, name).items()}


def _mapping(given: Any, name: str) -> Mapping[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise EvaError(f"{name} is {given!r}, but must be a mapping from settings to values.")
    return given or {}


def _options(path: str, values: Any) -> tuple[Any, ...]:
    """Return the values of a grid as the setting has them, so that `5e-4`, a string to YAML, is a number."""
    return tuple(convert(value, find_setting(path).kind, path) for value in values)


def _is_searched(path: str, value: Any) -> bool:
    """Return whether a value is a list of values, and not a value that is a list."""
    if not isinstance(value, list | tuple):
        return False
    kind = find_setting(path).kind
    return not any(typing.get_origin(part) in (tuple, Sequence) for part in (kind, *typing.get_args(kind)))


def _named(given: Any, key: str) -> dict[str, Any]:
    """Return what a mapping, a list or one string names; names of files are called by their stems."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list):
        names = [Path(item).stem if key == "recipes" else item for item in map(str, given)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise EvaError(f"{key} has {', '.join(sorted(twice))} twice; give each a name of its own.")
        return {name: item if key == "recipes" else None for name, item in zip(names, given, strict=True)}
    if given is not None and not isinstance(given, Mapping):
        raise EvaError(f"{key} is {given!r}, but must be a list, or a mapping from names.")
    return {str(name): value for name, value in (given or {}).items()}


def _located(folder: Path, given: Any) -> Any:
    """Return a recipe's file, alone or in a mapping, with its path from the folder of the sweep."""
    if isinstance(given, Mapping):
        return {key: _located(folder, value) if key == "recipe" else value for key, value in given.items()}
    return os.path.normpath(folder / Path(given).expanduser()) if isinstance(given, str) else given


def _local(folder: Path, name: str) -> str:
    """Return a model's name; one that is a path from the folder of the sweep gets that folder before it."""
    return os.path.normpath(folder / name) if (folder / name).exists() else name


def _rooted(folder: Path, given: Any) -> Any:
    """Return settings, in mappings of mappings, whose files have the folder of the sweep before them."""
    if not isinstance(given, Mapping):
        return given
    rooted = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            value = _rooted(folder, value)
        elif any(name in (s.path, s.path.rpartition(".")[2]) and s.is_path for s in all_settings()):
            each = value if isinstance(value, list) else [value]
            local = [_local(folder, item) if isinstance(item, str) else item for item in each]
            value = local if isinstance(value, list) else local[0]
        rooted[name] = value
    return rooted
