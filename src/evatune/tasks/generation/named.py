"""Tasks that have a name: which data sets they are, on the hub or in a folder.

A name with a slash belongs to a group, and the group's name means all of its tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatune.errors import EvaError, near_misses
from evatune.tasks.rows import SUFFIXES


@dataclass(frozen=True, kw_only=True)
class NamedTask:
    """Where the rows of a task are."""

    hub: str
    """Hub id."""
    config: str | None = None
    """Configuration on the hub."""
    train: str | None = "train"
    """Split to learn from; None for a task that is for scoring only."""
    held_out: str | None = "test"
    """Split to score on; None for a task that is for training only."""
    folder: str = ""
    """Its folder on disk, where that is not its name."""
    train_size: int | None = None
    """Rows to learn from on the hub."""
    programs: bool = False
    """Whether an answer is a program, which must be run to be scored."""


_MATH = "EleutherAI/hendrycks_math"

NAMED: dict[str, NamedTask] = {
    "commonsense/boolq": NamedTask(hub="google/boolq", held_out="validation", train_size=9_427),
    "commonsense/piqa": NamedTask(hub="baber/piqa", held_out="validation", train_size=16_113),
    "commonsense/siqa": NamedTask(
        hub="lighteval/siqa", held_out="validation", folder="commonsense/social_i_qa", train_size=33_410
    ),
    "commonsense/hellaswag": NamedTask(hub="Rowan/hellaswag", held_out="validation", train_size=39_905),
    "commonsense/winogrande": NamedTask(
        hub="allenai/winogrande", config="winogrande_xl", held_out="validation", train_size=40_398
    ),
    "commonsense/arc-e": NamedTask(
        hub="allenai/ai2_arc", config="ARC-Easy", folder="commonsense/ARC-Easy", train_size=2_251
    ),
    "commonsense/arc-c": NamedTask(
        hub="allenai/ai2_arc", config="ARC-Challenge", folder="commonsense/ARC-Challenge", train_size=1_119
    ),
    "commonsense/obqa": NamedTask(
        hub="allenai/openbookqa", config="main", folder="commonsense/openbookqa", train_size=4_957
    ),
    "metamath": NamedTask(hub="meta-math/MetaMathQA", held_out=None, train_size=395_000),
    "gsm8k": NamedTask(hub="openai/gsm8k", config="main", train_size=7_473),
    "math/algebra": NamedTask(hub=_MATH, config="algebra"),
    "math/counting": NamedTask(hub=_MATH, config="counting_and_probability"),
    "math/geometry": NamedTask(hub=_MATH, config="geometry"),
    "math/intermediate-algebra": NamedTask(hub=_MATH, config="intermediate_algebra"),
    "math/number-theory": NamedTask(hub=_MATH, config="number_theory"),
    "math/prealgebra": NamedTask(hub=_MATH, config="prealgebra"),
    "math/precalculus": NamedTask(hub=_MATH, config="precalculus"),
    "math-500": NamedTask(hub="HuggingFaceH4/MATH-500", train=None),
    "code-feedback": NamedTask(hub="m-a-p/Code-Feedback", held_out=None, train_size=66_383),
    "humaneval": NamedTask(hub="openai/openai_humaneval", train=None, programs=True),
    "mbpp": NamedTask(hub="google-research-datasets/mbpp", config="full", programs=True),
    "humaneval+": NamedTask(hub="evalplus/humanevalplus", train=None, programs=True),
    "mbpp+": NamedTask(hub="evalplus/mbppplus", train=None, programs=True),
}
"""All tasks by name."""

GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name in NAMED if name.startswith(f"{group}/"))
    for group in dict.fromkeys(name.partition("/")[0] for name in NAMED if "/" in name)
}
"""The tasks of each group by its name."""


def expanded(sources: Sequence[str]) -> list[str]:
    """Return sources with the tasks of a group in place of its name; files and hub ids stay.

    Raises:
        EvaError: a name begins as those of a group do, and there is no such task.
    """
    names: list[str] = []
    of_groups: set[str] = set()
    for source in sources:
        group = source.partition("/")[0]
        if source in of_groups:
            continue
        if Path(source).expanduser().exists() or group not in GROUPS or source in NAMED:
            names.append(source)
        elif source == group:
            added = [name for name in GROUPS[group] if name not in names]
            names += added
            of_groups.update(added)
        else:
            raise EvaError(
                f"there is no task {source!r}{near_misses(source, NAMED)}; {group} has {', '.join(GROUPS[group])}."
            )
    return names


def places(names: Sequence[str], *, folder: str | None, held_out: bool) -> dict[str, list[Mapping[str, Any]]]:
    """Return where the rows of the named tasks among some sources are.

    Args:
        names: sources; only those that are a key of `NAMED` and no file are looked at.
        folder: holds copies on disk: `FOLDER/commonsense/boolq/train.json`, ...; None takes the hub.
        held_out: the rows to score on, not those to learn from.

    Returns:
        For each task the arguments of `read_rows`, one mapping a file.

    Raises:
        EvaError: a task has no such rows.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name in names:
        if name not in NAMED or Path(name).expanduser().exists():
            continue
        task, split = NAMED[name], _split(name, held_out=held_out)
        if folder is None:
            found[name] = [{"name": task.hub, "split": split, "hub_config": task.config}]
        else:
            found[name] = [{"name": str(file)} for file in copies_of(name, folder=folder, held_out=held_out)]
    return found


def copies_of(name: str, *, folder: str, held_out: bool) -> list[Path]:
    """Return the files on disk with the rows of a named task.

    Args:
        name: a key of `NAMED`.
        folder: holds the copies, see `places`.
        held_out: the rows to score on, not those to learn from.

    Raises:
        EvaError: the task has no such rows, or there is no copy of them.
    """
    task, split = NAMED[name], _split(name, held_out=held_out)
    home = Path(folder).expanduser() / (task.folder or name)
    for known in (split, "test", "validation") if held_out else (split,):  # what copies call the rows to score on
        if files := sorted(path for path in home.glob(f"{known}*") if path.suffix in SUFFIXES):
            return files
    raise EvaError(
        f"{folder} has no copy of task {name!r}: {task.folder or name}/{split}{{{','.join(SUFFIXES)}}} is missing; "
        "name only the tasks that are there, or leave out data.folder for the hub."
    )


def stated_size(sources: Sequence[str]) -> int | None:
    """Return the number of rows to learn from, if all sources are tasks of which it is known."""
    sizes = [NAMED[name].train_size if name in NAMED else None for name in expanded(sources)]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _split(name: str, *, held_out: bool) -> str:
    """Return the split of a task to score on or to learn from."""
    split = NAMED[name].held_out if held_out else NAMED[name].train
    if split is None:
        use, setting = ("training", "eval") if held_out else ("scoring", "train")
        raise EvaError(f"task {name!r} is for {use} only; name another one in data.{setting}.")
    return split
