"""What a run learns: one folder a domain, and one row here.

A domain is data, a model with the right head, a way to make batches, and a score. Training and the command line know
only `evatune.tasks.task.Task`. To add a domain, write a folder with its `data:` settings and `open_task`, and a row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evatune.errors import EvaError, near_misses
from evatune.files import check_takes_files
from evatune.settings import Section
from evatune.tasks.control.settings import ControlData
from evatune.tasks.generation.settings import GenerationData
from evatune.tasks.settings import ModelSettings
from evatune.tasks.understanding.settings import UnderstandingData
from evatune.tasks.vision.settings import VisionData

if TYPE_CHECKING:
    from evatune.tasks.task import Preview, Task


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One row: the facts on a domain that are known before anything is loaded."""

    idea: str
    """What is learned, in a few words."""
    settings: type[Section]
    """Its `data:` section of a recipe."""
    required: tuple[str, ...] = ("train",)
    """Settings of that section without which nothing can be trained."""
    metric: str
    """The headline number."""
    metrics: Callable[[Any], Sequence[str]]
    """Takes the `data:` section and returns the names of all numbers that its scores can have; the name of a file or of
    a task may follow them (`accuracy/boolq`)."""
    home: str
    """The module that has `open_task(data, *, model, seed)`."""
    harness: str = ""
    """Home of what scores a model with lm-evaluation-harness, `(task, model, names, ...)`; empty where nothing does."""
    collects: bool = False
    """Whether the home can also make training data, with a function `collect(data, *, folder, processes, say)`."""
    fresh_held_out: bool = False
    """Whether a run with another seed is scored on other held-out examples than all runs with this one."""
    kind: str | None = None
    """The head that transformers must know for a pretrained model (`evatune.models.kinds`), if it matters."""
    keeps_journal: bool = False
    """Whether the task's `evaluate` takes a `journal`, so that a stopped evaluation can go on."""
    head: str | None = None
    """For domains whose rows are token ids: the head of the model (see `evatune.models.load_model`), by which
    `evatune measure --from-disk` and `--dry-run` build it; its `data:` section has `max_length` then."""


DOMAINS: dict[str, Domain] = {
    "generation": Domain(
        idea="a causal language model continues prompts",
        settings=GenerationData,
        metric="loss",
        metrics=GenerationData.metrics,
        home="evatune.tasks.generation.task",
        harness="evatune.tasks.generation.harness:evaluate",
        kind="causal-lm",
        keeps_journal=True,
        head="causal-lm",
    ),
    "understanding": Domain(
        idea="a language model learns classes, numbers, tags or answers of texts",
        settings=UnderstandingData,
        metric="accuracy",
        metrics=UnderstandingData.metrics,
        home="evatune.tasks.understanding.task",
        keeps_journal=True,
        kind="sequence-classification",
        head="sequence-classification",
    ),
    "vision": Domain(
        idea="a vision model learns the classes of pictures",
        settings=VisionData,
        metric="accuracy",
        metrics=lambda _: ("accuracy", "loss"),
        kind="image-classification",
        home="evatune.tasks.vision.task",
    ),
    "control": Domain(
        idea="a Decision Transformer acts in simulated environments",
        settings=ControlData,
        metric="success",
        metrics=lambda _: ("success", "return"),
        home="evatune.tasks.control.task",
        collects=True,
        fresh_held_out=True,
    ),
}
"""All domains by their name after `task:` in a recipe."""

DEFAULT = next(iter(DOMAINS))
"""The domain of a recipe that names none."""


def collecting_domains() -> list[str]:
    """Return the names of the domains that can make training data."""
    return [name for name, domain in DOMAINS.items() if domain.collects]


def find_domain(name: str) -> Domain:
    """Return the row of a domain.

    Raises:
        EvaError: there is no domain of this name.
    """
    if not isinstance(name, str) or name not in DOMAINS:
        raise EvaError(f"task is {name!r}, but must be one of {', '.join(DOMAINS)}{near_misses(str(name), DOMAINS)}.")
    return DOMAINS[name]


def open_task(name: str, data: Section, *, model: ModelSettings, seed: int, offline: bool = False) -> Task:
    """Return a task; neither weights nor rows are read yet.

    Args:
        name: a key of `DOMAINS`.
        data: the settings of its `data:` section.
        model: which pretrained model.
        seed: of the order of the examples, and of which are kept.
        offline: ask no hub.

    Raises:
        EvaError: there is no such domain, or no such model, or the model is one for another domain.
    """
    _check_kind(name, model, offline=offline)
    return importlib.import_module(find_domain(name).home).open_task(data, model=model, seed=seed)


def _check_kind(name: str, model: ModelSettings, *, offline: bool) -> None:
    """Check that a model is not one for another domain, where its configuration tells."""
    from evatune.models.kinds import fitting_heads
    from evatune.models.loading import load_config
    from evatune.tasks.outline import read_shape

    domain = find_domain(name)
    kind, folder = domain.kind, Path(model.name).expanduser()
    is_elsewhere = model.name.startswith("package:") or model.name.endswith(".gguf") or model.trust_remote_code
    if kind is None or model.gguf_file or is_elsewhere:
        return
    is_hub_id = domain.head is not None and not folder.exists()  # timm's models have no such configuration
    if not is_hub_id and not (folder / "config.json").is_file():
        return
    config = read_shape(model)[0] if offline else load_config(model.name, revision=model.revision)
    heads = fitting_heads(config) if config is not None else []
    if heads and kind not in heads:
        others = [other for other, domain in DOMAINS.items() if domain.kind in heads]
        way_out = f"it is one for task {' or '.join(others)} (--task)" if others else "take another model"
        raise EvaError(f"the model {model.name} does not fit task {name!r}, where {domain.idea}; {way_out}.")


def collect(
    name: str, data: Section, *, folder: str | Path, processes: int = 1, say: Callable[[str], None] = lambda _: None
) -> Preview:
    """Make the training data of a task and keep them in a folder.

    Args:
        name: a key of `DOMAINS`.
        data: the settings of its `data:` section.
        folder: holds the data; what is there already is kept and added to.
        processes: how many work side by side.
        say: gets lines on what is going on.

    Returns:
        What was made, as text and as plain values.

    Raises:
        EvaError: there is no such domain, it makes no data, the folder cannot be written, or making them failed.
    """
    domain = find_domain(name)
    if not domain.collects:
        able = ", ".join(collecting_domains())
        raise EvaError(f"task {name!r} reads its training data and cannot make them; tasks that can: {able}.")
    check_takes_files(folder)
    return importlib.import_module(domain.home).collect(data, folder=folder, processes=processes, say=say)
