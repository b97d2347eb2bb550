"""The recipe: everything that one fine-tuning run depends on, as plain dataclasses.

A recipe comes from a YAML file, from the options of the command line, or from Python; all three build the same
objects, which check their values. The text under a field is its help on the command line.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from evatune.errors import EvaError, near_misses
from evatune.files import user_cache
from evatune.methods import Choice, check_takes_plan, check_train_a, parse_method
from evatune.settings import (
    Adapter,
    Decomposition,
    Gradients,
    Measuring,
    Rows,
    Section,
    Stopping,
    TrainSettings,
    check_kept,
    field_docs,
    field_types,
    number,
)
from evatune.tasks import DEFAULT, DOMAINS, find_domain
from evatune.tasks.rows import is_here
from evatune.tasks.settings import ModelSettings, path_setting


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Adapter):
    """The adapter and how it starts."""

    section: ClassVar[str] = "adapter"
    main: ClassVar[str] = "method"
    splits_names: ClassVar[bool] = True

    plan: str | None = path_setting(None)
    """Plan that `evatune plan --save` or a run wrote (plan.json): its ranks and alphas are taken as they are, and its
    rank, rho, metric and budget replace those of the recipe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_train_a(self.choice, train_a=self.train_a)
            if self.plan is not None:
                check_takes_plan(self.choice)
        except EvaError as error:
            raise EvaError(f"adapter.method: {error}") from None

    @property
    def choice(self) -> Choice:
        """What the method's name means."""
        return parse_method(self.method)


@dataclass(frozen=True, kw_only=True)
class MeasureSettings(Gradients, Rows, Decomposition, Stopping):
    """How the activations are measured (EVA)."""

    section: ClassVar[str] = "measure"
    main: ClassVar[str] = "spectra"

    spectra: str | None = path_setting(None)
    """Folder of spectra measured before; then nothing is measured."""
    batch_size: int = number(4, low=1)
    """Examples in one measured batch."""
    sampling: Literal["random", "stratified"] = "random"
    """How these examples are drawn: at random, or in equal shares of each kind (task, class, environment)."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """One fine-tuning run.

    Example:
        >>> recipe = Recipe(adapter=AdapterSettings(rank=8), output="runs/first")
        >>> recipe.adapter.rho
        2.0
    """

    task: str = DEFAULT
    """What the run learns; it decides which settings the section `data` has."""
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    """The pretrained model."""
    data: Section = dataclasses.field(default=None)  # type: ignore[assignment]  # when it is built: the task's own
    """The training data and the held-out data, as the task wants them; by default the task's own defaults."""
    adapter: AdapterSettings = dataclasses.field(default_factory=AdapterSettings)
    """The adapter and how it starts."""
    measure: MeasureSettings = dataclasses.field(default_factory=MeasureSettings)
    """How the activations are measured (EVA)."""
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)
    """How the adapter is trained."""
    output: str = ""
    """Folder that the run writes."""

    def __post_init__(self) -> None:
        wanted = find_domain(self.task).settings
        object.__setattr__(self, "data", wanted() if self.data is None else self.data)
        super().__post_init__()
        if type(self.data) is not wanted:
            raise EvaError(f"data is a {type(self.data).__name__}, but task {self.task!r} needs a {wanted.__name__}.")
        check_kept(self.measure.n_components, self.adapter.rank, self.adapter.rho)
        if self.train.layer_decay < 1 and (option := self.adapter.choice.optimizing):
            raise EvaError(
                f"train.layer_decay is {self.train.layer_decay:g}, but {option} has rates of its own; leave one out."
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """Build a recipe from nested mappings; missing keys take their defaults.

        A section may also be given as a plain value, which then is its main setting: `model: some/name`.

        Raises:
            EvaError: an unknown key, a wrong type or a value out of range.
        """
        task = content.get("task", DEFAULT)
        kinds = _kinds(task)
        values: dict[str, Any] = {}
        for key, value in content.items():
            if key not in cls.field_names():
                raise EvaError(f"a recipe has no section {key!r}{near_misses(str(key), cls.field_names())}.")
            kind = kinds.get(key)
            if kind is None:
                values[key] = value
                continue
            if not isinstance(value, Mapping):
                value = {} if value is None else {kind.main: value}
            for name in value:
                if name not in kind.field_names():
                    raise EvaError(_no_such_setting(key, str(name), kind, task=task))
            values[key] = kind(**value)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values, ready for JSON and YAML; `from_dict` restores the recipe."""
        return self.to_json()

    @property
    def measuring(self) -> Measuring:
        """The options of `evatune.measure` that this recipe means."""
        adapter, train = self.adapter, self.train
        return Measuring(
            **adapter.shared(Measuring)
            | self.measure.shared(Measuring)
            | {"metric": adapter.choice.method.options.get("metric", adapter.metric)},
            seed=train.seed,
            dtype={"auto": "auto", "fp32": None, "bf16": "bfloat16"}[train.precision],
        )

    def with_absolute_paths(self) -> Recipe:
        """Return the same recipe with the full paths of the files that exist, so that it can be read from anywhere."""

        def absolute(value: Any) -> Any:
            path = Path(value).expanduser() if isinstance(value, str) and value else None
            return os.path.abspath(path) if path is not None and is_here(path) else value

        sections: dict[str, Any] = {
            section: dataclasses.replace(
                getattr(self, section),
                **{name: _each(getattr(getattr(self, section), name), absolute) for name in names},
            )
            for section, names in _path_names(self.task).items()
        }
        output = os.path.abspath(Path(self.output).expanduser()) if self.output else ""
        return dataclasses.replace(self, output=output, **sections)

    def to_yaml(self) -> str:
        """Return the recipe as YAML; `load_recipe` restores it."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def require(self, *names: str) -> None:
        """Check that settings without a default were given.

        Args:
            names: of `model`, `data` and `output`.

        Raises:
            EvaError: one of them is missing.
        """
        given = {
            "model": self.model.name,
            "data": all(getattr(self.data, name) for name in find_domain(self.task).required),
            "output": self.output,
        }
        for name in names:
            if not given[name]:
                raise EvaError(f"no {name} was given; set `{name}` in the recipe or pass --{name}.")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One leaf of the recipe, as the command line shows it."""

    path: str
    """Dotted name, for example `train.learning_rate`."""
    option: str
    """Shortest option that names this setting only, for example `--learning-rate`."""
    kind: Any
    """Its type annotation."""
    default: Any
    """Its default value."""
    help: str
    """The text under the field."""
    is_path: bool = False
    """Whether it names files or folders."""
    tasks: tuple[str, ...] = ()
    """The tasks that have it, if not all have."""


MEANT = {
    "lr": "train.learning_rate",
    "alpha": "adapter.lora_alpha",
    "dropout": "adapter.lora_dropout",
    "targets": "adapter.target_modules",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "bs": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "lr_scheduler_type": "train.schedule",
    "train": "data.train",
    "dataset": "data.train",
    "train_file": "data.train",
    "model_name_or_path": "model.name",
    "output_dir": "output",
}
"""Settings as other programs call them, and what they are called here."""


@cache
def all_settings() -> tuple[Setting, ...]:
    """Return every leaf of the recipe in its order."""
    leaves = list(_leaves())
    names = [leaf.name for _, leaf, _ in leaves]
    settings = []
    for section, leaf, kind in leaves:
        path = f"{section.section}.{leaf.name}".lstrip(".")
        short = leaf.name if names.count(leaf.name) == 1 else path
        # `--model` and `--data` mean the main setting of these sections.
        short = {"model.name": "model", "data.train": "data"}.get(path, short)
        having = tuple(name for name, domain in DOMAINS.items() if leaf.name in domain.settings.field_names())
        settings.append(
            Setting(
                path=path,
                option="--" + short.replace("_", "-"),
                kind=kind,
                default=leaf.default,
                help=_help(section, leaf.name),
                is_path=bool(leaf.metadata.get("path")),
                tasks=having if section.section == "data" and len(having) < len(DOMAINS) else (),
            )
        )
    return tuple(settings)


def _help(section: type[Section], name: str) -> str:
    """Return the text of a setting; where it means something else in each task, what it means in which."""
    texts: dict[str, list[str]] = {}
    for task, domain in DOMAINS.items():
        kind = domain.settings if section.section == "data" else section
        if name in kind.field_names():
            texts.setdefault(field_docs(kind)[name], []).append(task)
    if len(texts) == 1:
        return next(iter(texts))
    return " ".join(f"{' and '.join(tasks)}: {text}" for text, tasks in texts.items())


def find_setting(name: str) -> Setting:
    """Return the setting that a name means: its leaf (`rank`) where that is unique, else its dotted path.

    Args:
        name: hyphens and underscores are the same.

    Raises:
        EvaError: there is none, or there are several.
    """
    wanted = name.strip("-").replace("-", "_")
    for setting in all_settings():
        if wanted in (setting.path, setting.option.strip("-").replace("-", "_")):
            return setting
    ambiguous = [s.path for s in all_settings() if s.path.endswith("." + wanted)]
    if ambiguous:
        raise EvaError(
            f"setting {name!r} could mean {' or '.join(repr(path) for path in ambiguous)}; write one of them."
        )
    known = [s.path for s in all_settings()] + [s.path.rpartition(".")[2] for s in all_settings()]
    raise EvaError(f"there is no setting {name!r}{near_misses(wanted, dict.fromkeys(known))}.")


def load_recipe(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file and apply overrides.

    Args:
        path: YAML file; relative paths inside it are taken from its own folder. None starts from the defaults.
        overrides: setting -> value or text. A setting is named by its leaf (`rank`) where that is unique, else by its
            dotted path (`train.batch_size`); hyphens and underscores are the same.

    Returns:
        The checked recipe.

    Raises:
        EvaError: the file is missing or no YAML, or a key, type or value in it is wrong.
    """
    content = _relative_to(Path(path).parent, read_yaml(path)) if path is not None else {}
    changed = {find_setting(name).path: value for name, value in (overrides or {}).items()}
    for setting, value in changed.items():
        section, _, leaf = setting.rpartition(".")
        if not section:
            content[leaf] = value
            continue
        if not isinstance(content.get(section), dict):
            given = content.get(section)
            content[section] = {} if given is None else {_kinds(DEFAULT)[section].main: given}
        content[section][leaf] = value
        if setting == "train.epochs" and "train.steps" not in changed:
            content[section]["steps"] = None  # those of the file would win
    try:
        return Recipe.from_dict(_expand(content))
    except EvaError as error:
        if path is None or (changed and not _is_of_file(path, error)):
            raise
        raise EvaError(f"{path}: {error}") from None


def _is_of_file(path: str | Path, error: EvaError) -> bool:
    """Return whether a recipe file has this mistake also without overrides."""
    try:
        load_recipe(path)
    except EvaError as own:
        return str(error) in str(own)
    return False


_DATA = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
"""Endings of files that hold data."""


def read_yaml(path: str | Path, *, kind: str = "recipe", holds: str = "sections such as `model:` and `data:`") -> dict:
    """Return what a YAML file holds.

    Args:
        path: the file.
        kind: what errors call it.
        holds: what errors say that it must hold.

    Raises:
        EvaError: the file is missing, is no YAML, has a key twice, or holds no mapping.
    """
    import yaml

    path = Path(path)
    if path.is_dir():
        run = f", or `--resume --output {path}` to go on with this run" if (path / "recipe.yaml").is_file() else ""
        raise EvaError(f"{path} is a folder, but a {kind} is a YAML file; name the file{run}.")
    if path.suffix in _DATA and path.is_file():
        raise EvaError(f"{path} is no {kind}, which is a YAML file; give data with --data {path}.")
    if not path.is_file():
        near = near_misses(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise EvaError(f"there is no {kind} file {path}{near}.")
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        _check_keys(node, path)
        content = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise EvaError(f"{path} is not valid YAML: {why}.") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise EvaError(f"{path} must hold {holds}, not a {type(content).__name__}.")
    return content


def _leaves() -> Iterator[tuple[type[Section], dataclasses.Field[Any], Any]]:
    """Yield section, field and type of every setting; a setting that several tasks have in `data` comes once."""
    hints = field_types(Recipe)
    for field in dataclasses.fields(Recipe):
        kinds: list[Any] = [hints[field.name]]
        if field.name == "data":
            kinds = [domain.settings for domain in DOMAINS.values()]
        if not dataclasses.is_dataclass(kinds[0]):
            yield Recipe, field, kinds[0]
            continue
        seen: set[str] = set()
        for kind in kinds:
            inner = field_types(kind)
            for leaf in dataclasses.fields(kind):
                if leaf.name not in seen:
                    seen.add(leaf.name)
                    yield typing.cast(type[Section], kind), leaf, inner[leaf.name]


def _kinds(task: str) -> dict[str, type[Section]]:
    """Return the sections of a task's recipe by name."""
    hints = field_types(Recipe) | {"data": find_domain(task).settings}
    return {name: kind for name, kind in hints.items() if isinstance(kind, type) and issubclass(kind, Section)}


def _path_names(task: str) -> dict[str, list[str]]:
    """Return the settings that name files or folders, by section."""
    found = {
        section: [field.name for field in dataclasses.fields(kind) if field.metadata.get("path")]  # type: ignore[arg-type]
        for section, kind in _kinds(task).items()
    }
    return {section: names for section, names in found.items() if names}


def _no_such_setting(section: str, name: str, kind: Any, *, task: str) -> str:
    """Return the sentence for an unknown setting of a section, which may be another task's."""
    others = [other for other, domain in DOMAINS.items() if section == "data" and name in domain.settings.field_names()]
    if others:
        return (
            f"the section 'data' of task {task!r} has no setting {name!r}; it belongs to task {' and '.join(others)}."
        )
    places = [setting.path for setting in all_settings() if setting.path.rpartition(".")[2] == name]
    meant = MEANT.get(name) or (places[0] if len(places) == 1 else "")
    hint = f" (did you mean {meant!r}?)" if meant else near_misses(name, kind.field_names())
    return f"the recipe's section {section!r} has no setting {name!r}{hint}."


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value, or every item of a list, changed."""
    return type(value)(map(change, value)) if isinstance(value, list | tuple) else change(value)


def _check_keys(node: Any, path: Path) -> None:
    """Check that no mapping has the same key twice; YAML would silently take the last one."""
    if node is None or isinstance(node.value, str):
        return
    if node.id == "sequence":
        for item in node.value:
            _check_keys(item, path)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key.value, str):
            if key.value in lines:
                raise EvaError(f"{path} has the key {key.value!r} twice, in lines {lines[key.value]} and {line}.")
            lines[key.value] = line
        _check_keys(value, path)


def _relative_to(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with its relative paths made relative to `folder` instead of the current folder."""

    def local(value: Any) -> Any:
        if not isinstance(value, str) or not value or value.startswith(("~", "$", "package:")):
            return value
        # A hub id looks like a relative path: if the path exists, it is a path.
        return os.path.normpath(folder / value) if is_here(folder / value) else value

    content = dict(content)
    task = content.get("task", DEFAULT)
    for section, names in _path_names(task if task in DOMAINS else DEFAULT).items():
        value = content.get(section)
        if isinstance(value, dict):
            content[section] = {key: _each(item, local) if key in names else item for key, item in value.items()}
        else:
            content[section] = _each(value, local)
    output = content.get("output")
    if isinstance(output, str) and output and not output.startswith(("~", "$")):
        content["output"] = os.path.normpath(folder / output)
    return content


def _expand(value: Any) -> Any:
    """Return the value with ${VARIABLES} of the environment filled in; `EVATUNE_CACHE` always has a value."""
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_expand(item) for item in value]
    if not isinstance(value, str) or "$" not in value:
        return value

    known = {**os.environ, "EVATUNE_CACHE": str(user_cache())}

    def fill(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise EvaError(f"{value!r} needs the environment variable {match[1]}; set it or override the path.")
        return known[match[1]]

    return re.sub(r"\$\{(\w+)\}", fill, value)
