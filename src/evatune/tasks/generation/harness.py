"""Scoring with lm-evaluation-harness: its own tasks, and those of this package with the paper's prompts.

The definitions of the latter are files in `lm_eval/` beside this module, which any lm-evaluation-harness reads with
`--include_path`: `evatune_commonsense`, its eight tasks, and `evatune_gsm8k`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evatune.errors import EvaError, near_misses
from evatune.tasks.generation.named import NAMED, copies_of
from evatune.tasks.task import evaluating

if TYPE_CHECKING:
    from evatune.tasks.generation.task import Generation

DEFINITIONS = Path(__file__).parent / "lm_eval"
"""Folder of the task definitions."""
_PREFIX = "evatune_"
_LOADERS: dict[str, dict[str, Any]] = {
    ".jsonl": {"dataset_path": "json"},
    ".json": {"dataset_path": "json"},
    ".csv": {"dataset_path": "csv"},
    ".tsv": {"dataset_path": "csv", "dataset_kwargs": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}},
    ".parquet": {"dataset_path": "parquet"},
    ".arrow": {"dataset_path": "arrow"},
}
"""What reads copies of the data, by their ending."""


def evaluate(
    task: Generation,
    model: Any,
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    bf16: bool = False,
) -> dict[str, Any]:
    """Score a model on tasks of lm-evaluation-harness.

    Args:
        task: has the tokenizer, and `data.folder` for copies of the data on disk.
        model: a causal language model, with or without adapter.
        names: of tasks, groups or tags.
        limit: score the first so many examples of each task.
        num_fewshot: examples in front of each question; by default what the task says.
        batch_size: requests in a batch.
        bf16: compute in bfloat16 autocast.

    Returns:
        `results` (task -> metric -> number), `groups`, `versions`, `n_samples`, `samples` (task -> one mapping an
        example) and `seconds`.

    Raises:
        EvaError: lm-eval is not installed, there is no such task, there is no copy of its data in the folder, or they
            cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaError(
            f"scoring with lm-eval needs the package lm-eval ({error}); run: pip install 'evatune[lm-eval]'."
        ) from None
    started = time.perf_counter()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are not for users of this program
    with evaluating(model), _definitions(names, copies=task.data.folder) as folder:
        ours = all(name.startswith(_PREFIX) for name in names)  # the index of all others takes a while
        manager = TaskManager(include_path=str(folder), include_defaults=not ours)
        for name in names:
            if name not in manager.all_tasks:
                raise EvaError(f"lm-eval has no task {name!r}{near_misses(name, sorted(manager.all_tasks))}.")
        language_model = HFLM(
            pretrained=model,
            tokenizer=task.tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if bf16 else None,
        )
        try:
            found = lm_eval.simple_evaluate(
                model=language_model,
                tasks=list(names),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=1000,
            )
        except EvaError:
            raise
        except Exception as error:  # data sets of a hub fail in any way
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EvaError(f"lm-eval cannot score {', '.join(names)}: {reason.rstrip('.')}.") from error
    assert found is not None
    wanted = ("results", "groups", "versions", "n-samples", "samples")
    content = {name.replace("-", "_"): found[name] for name in wanted if name in found}
    return content | {"seconds": time.perf_counter() - started, "lm_eval": lm_eval.__version__}


@contextlib.contextmanager
def _definitions(names: Sequence[str], *, copies: str | None) -> Iterator[Path]:
    """Give the folder of the definitions; with copies of the data on disk, one where the named tasks read them."""
    if copies is None:
        yield DEFINITIONS
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in DEFINITIONS.glob("[!_]*.yaml"):
            task = path.stem if path.stem in NAMED else f"commonsense/{path.stem}"
            group, _, own = task.rpartition("/")
            if task not in NAMED:
                text = path.read_text(encoding="utf-8")
            elif {f"{_PREFIX}{own.replace('-', '_')}", f"{_PREFIX}{group}"} & set(names):
                text = json.dumps({"include": str(path), **_from_disk(task, copies)}, ensure_ascii=False)
            else:
                text = json.dumps({"include": str(path)}, ensure_ascii=False)  # JSON is YAML too
            (folder / path.name).write_text(text, encoding="utf-8")
        yield folder


def _from_disk(task: str, folder: str) -> dict[str, Any]:
    """Return what makes lm-eval read the held-out rows of a task from their copy."""
    files = copies_of(task, folder=folder, held_out=True)
    if len({file.suffix for file in files}) > 1:
        raise EvaError(f"the copies of task {task!r} have several endings ({', '.join(map(str, files))}); keep one.")
    loader = _LOADERS[files[0].suffix]
    kwargs = loader.get("dataset_kwargs", {}) | {"data_files": {"test": [str(file) for file in files]}}
    return loader | {"dataset_name": None, "test_split": "test", "dataset_kwargs": kwargs}
