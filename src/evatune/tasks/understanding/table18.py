"""The best settings of LoRA and EVA for each task of GLUE that the EVA paper found (Appendix C, Table 18), as runs.

    python -m evatune.tasks.understanding.table18 --model roberta-large        one line of JSON a run

Each line has the settings in which a run differs from recipes/paper/glue-MODEL.yaml.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from evatune.errors import EvaError, near_misses
from evatune.tasks.understanding.glue import TASKS

FIVE_SEEDS = ("cola", "rte", "mrpc", "stsb")
"""Tasks that Table 2 has means of five seeds of; of the others it has three."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One task of Table 18 for one model."""

    batch_size: int
    """Examples in a step; the paper trained on four GPUs and does not say whether this is the batch of one."""
    epochs: int
    """Passes over the training data."""
    best: Mapping[str, tuple[int, float]]
    """Method -> best rank and learning rate."""


TABLE_18: dict[str, dict[str, Row]] = {
    "roberta-large": {
        "mnli": Row(batch_size=8, epochs=10, best={"lora": (2, 4e-4), "eva": (2, 4e-4)}),
        "sst2": Row(batch_size=16, epochs=10, best={"lora": (8, 1e-3), "eva": (2, 1e-3)}),
        "mrpc": Row(batch_size=8, epochs=20, best={"lora": (8, 4e-4), "eva": (4, 4e-4)}),
        "cola": Row(batch_size=8, epochs=20, best={"lora": (4, 1e-3), "eva": (2, 1e-3)}),
        "qnli": Row(batch_size=8, epochs=10, best={"lora": (8, 1e-3), "eva": (16, 4e-4)}),
        "qqp": Row(batch_size=8, epochs=20, best={"lora": (4, 1e-3), "eva": (8, 1e-3)}),
        "rte": Row(batch_size=16, epochs=20, best={"lora": (2, 1e-3), "eva": (4, 1e-3)}),
        "stsb": Row(batch_size=8, epochs=10, best={"lora": (2, 4e-4), "eva": (4, 1e-3)}),
    },
    "deberta-v3-base": {
        "mnli": Row(batch_size=32, epochs=30, best={"lora": (8, 4e-4), "eva": (8, 4e-4)}),
        "sst2": Row(batch_size=32, epochs=60, best={"lora": (4, 1e-3), "eva": (2, 4e-4)}),
        "mrpc": Row(batch_size=16, epochs=30, best={"lora": (4, 4e-3), "eva": (4, 4e-3)}),
        "cola": Row(batch_size=32, epochs=80, best={"lora": (8, 4e-3), "eva": (8, 4e-3)}),
        "qnli": Row(batch_size=64, epochs=25, best={"lora": (16, 4e-3), "eva": (16, 4e-3)}),
        "qqp": Row(batch_size=32, epochs=25, best={"lora": (4, 4e-3), "eva": (4, 4e-3)}),
        "rte": Row(batch_size=32, epochs=80, best={"lora": (4, 4e-3), "eva": (2, 4e-3)}),
        "stsb": Row(batch_size=16, epochs=40, best={"lora": (8, 4e-3), "eva": (2, 4e-3)}),
    },
}
"""Model -> task -> what Table 18 says. Batch size and epochs are the same for LoRA and EVA."""


def runs(model: str, *, method: str | None = None, tasks: Iterable[str] = TASKS) -> list[dict[str, Any]]:
    """Return the runs with the best settings, over the seeds of Table 2.

    Args:
        model: a key of `TABLE_18`.
        method: one that the table has; None takes all.
        tasks: names of tasks of GLUE.

    Returns:
        For each run the settings in which it differs from the recipe, by their dotted names.

    Raises:
        EvaError: the table does not have the model, the method or a task.
    """
    _check("model", model, TABLE_18)
    tasks = list(tasks)
    for task in tasks:
        _check("task", task, TABLE_18[model])
    known = next(iter(TABLE_18[model].values())).best
    if method is not None and method not in known:
        raise EvaError(f"Table 18 has the best settings of {' and '.join(known)}, not of {method}: search for them.")
    found: list[dict[str, Any]] = []
    for task, name in product(tasks, known if method is None else [method]):
        row = TABLE_18[model][task]
        rank, rate = row.best[name]
        settings = {
            "data.glue": task,
            "adapter.method": name,
            "adapter.rank": rank,
            "train.batch_size": row.batch_size,
            "train.epochs": row.epochs,
            "train.learning_rate": rate,
        }
        found += [settings | {"train.seed": seed} for seed in range(5 if task in FIVE_SEEDS else 3)]
    return found


def _check(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise EvaError(f"Table 18 has no {what} {name!r}{near_misses(name, known)}; it has {', '.join(known)}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the best runs of the EVA paper on GLUE, one line of JSON each: the settings that differ from the recipe."""
    parser = argparse.ArgumentParser(prog="python -m evatune.tasks.understanding.table18", description=main.__doc__)
    parser.add_argument("--model", choices=tuple(TABLE_18), default="roberta-large")
    parser.add_argument("--method", help="lora or eva (default: both)")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), metavar="TASK")
    options = parser.parse_args(arguments)
    try:
        found = runs(options.model, method=options.method, tasks=options.tasks)
    except EvaError as error:
        parser.error(str(error))
    for run in found:
        sys.stdout.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
