"""The runs of the EVA paper on GLUE (Appendix C): the search over rank and learning rate, and the best of Table 18.

    python -m evatune.tasks.understanding.glue_plan best --model roberta-large        one line of JSON a run
    python -m evatune.tasks.understanding.glue_plan search --model deberta-v3-base --method boft --tasks cola rte

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

from evatune.errors import EvaError
from evatune.methods import parse_method
from evatune.tasks.understanding.glue import TASKS

SIZES = {"rank": (2, 4, 6, 8, 16), "block_size": (2, 4, 8, 16)}
"""Setting of the adapter -> its values in the search. Section C.3 has the ranks 2 to 8; Tables 18 and 19 have 16 too.
AdaLoRA starts four ranks above each, BOFT has blocks in place of a rank."""
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


LEARNING_RATES = {"roberta-large": (1e-3, 4e-4, 1e-4), "deberta-v3-base": (4e-3, 1e-3, 4e-4)}
"""Learning rates of the search for each model (Section C.3)."""
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


def plan_best(model: str, *, method: str | None = None, tasks: Iterable[str] = TASKS) -> list[dict[str, Any]]:
    """Return the runs with the best settings, over the seeds of Table 2.

    Args:
        model: a key of `TABLE_18`.
        method: one that the table has; None takes all.
        tasks: names of tasks of GLUE.

    Returns:
        For each run the settings in which it differs from the recipe, by their dotted names.

    Raises:
        EvaError: the table does not have the method.
    """
    known = next(iter(TABLE_18[model].values())).best
    if method is not None and method not in known:
        raise EvaError(f"Table 18 has the best settings of {' and '.join(known)}, not of {method}: search for them.")
    runs = []
    for task, name in product(tasks, known if method is None else [method]):
        rank, rate = TABLE_18[model][task].best[name]
        for seed in range(5 if task in FIVE_SEEDS else 3):
            runs.append(_run(model, task, name, rate=rate, seed=seed) | {"adapter.rank": rank})
    return runs


def plan_search(model: str, *, method: str, tasks: Iterable[str] = TASKS) -> list[dict[str, Any]]:
    """Return the runs that look for the best learning rate, and rank or block size; see `plan_best`.

    Args:
        model: a key of `TABLE_18`.
        method: any method.
        tasks: names of tasks of GLUE.
    """
    setting = parse_method(method).method.size
    sizes = [{f"adapter.{setting}": size} for size in SIZES[setting]] if setting else [{}]
    return [
        _run(model, task, method, rate=rate, seed=0) | size
        for task, size, rate in product(tasks, sizes, LEARNING_RATES[model])
    ]


def _run(model: str, task: str, method: str, *, rate: float, seed: int) -> dict[str, Any]:
    row = TABLE_18[model][task]
    return {
        "data.glue": task,
        "adapter.method": method,
        "train.batch_size": row.batch_size,
        "train.epochs": row.epochs,
        "train.learning_rate": rate,
        "train.seed": seed,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the runs of the EVA paper on GLUE, one line of JSON a run: the settings that differ from the recipe."""
    parser = argparse.ArgumentParser(prog="python -m evatune.tasks.understanding.glue_plan", description=main.__doc__)
    parser.add_argument("stage", choices=("search", "best"))
    parser.add_argument("--model", choices=tuple(TABLE_18), default="roberta-large")
    parser.add_argument("--method", help="for search any (default: eva); for best one of Table 18 (default: all)")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), metavar="TASK")
    options = parser.parse_args(arguments)
    try:
        if options.stage == "search":
            runs = plan_search(options.model, method=options.method or "eva", tasks=options.tasks)
        else:
            runs = plan_best(options.model, method=options.method, tasks=options.tasks)
    except EvaError as error:
        parser.error(str(error))
    for run in runs:
        sys.stdout.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
