"""Scoring with lm-evaluation-harness: its own tasks, and those of this package with the paper's prompts.

The definitions of the latter are files in `lm_eval/` beside this module, which any lm-evaluation-harness reads with
`--include_path`: `evatune_commonsense`, `evatune_math`, their tasks, `evatune_gsm8k`, `evatune_humaneval`, ...
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
from evatune.tasks.generation.sandbox import report
from evatune.tasks.task import evaluating

if TYPE_CHECKING:
    from evatune.tasks.generation.task import Generation

DEFINITIONS = Path(__file__).parent / "lm_eval"
"""Folder of the task definitions."""
_PREFIX = "evatune_"
_NAMED = {name.replace("/", "-").removeprefix("commonsense-"): name for name in NAMED}
"""The named task of each definition."""
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
        task: has the tokenizer, `data.folder` for copies of the data on disk, and the permission to run programs.
        model: a causal language model, with or without adapter.
        names: of tasks, groups or tags.
        limit: score the first so many examples of each task.
        num_fewshot: examples in front of each question; by default what the task says.
        batch_size: requests in a batch.
        bf16: compute in bfloat16 autocast.

    Returns:
        `results` (task -> metric -> number), `groups`, `versions`, `n_samples`, `samples` (task -> one mapping an
        example), `notes` and `seconds`.

    Raises:
        EvaError: lm-eval is not installed, there is no such task, there is no copy of its data in the folder, they
            cannot be loaded, or programs of the model may not be run.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise EvaError(
            f"scoring with lm-eval needs the package lm-eval ({error}); run: pip install 'evatune[lm-eval]'."
        ) from None
    started = time.perf_counter()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are not for users of this program
    notes = _notes_on_programs(names, allowed=task.data.allow_code_execution)
    with evaluating(model), _definitions(names, copies=task.data.folder, runs_programs=bool(notes)) as folder:
        manager = _manager(names, folder)
        language_model = HFLM(
            pretrained=model,
            tokenizer=task.tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if bf16 else None,
        )
        found = _found(language_model, names, manager, limit=limit, num_fewshot=num_fewshot)
    wanted = ("results", "groups", "versions", "n-samples", "samples")
    content = {name.replace("-", "_"): found[name] for name in wanted if name in found}
    return content | {"notes": notes, "seconds": time.perf_counter() - started, "lm_eval": lm_eval.__version__}


def _manager(names: Sequence[str], folder: Path) -> Any:
    """Return what finds tasks: our definitions in a folder, and lm-eval's own where one of them is asked for."""
    from lm_eval.tasks import TaskManager

    ours = all(name.startswith(_PREFIX) for name in names)  # the index of all others takes a while
    manager = TaskManager(include_path=str(folder), include_defaults=not ours)
    for name in names:
        if name not in manager.all_tasks:
            raise EvaError(f"lm-eval has no task {name!r}{near_misses(name, sorted(manager.all_tasks))}.")
    return manager


def _found(
    language_model: Any, names: Sequence[str], manager: Any, *, limit: int | None, num_fewshot: int | None
) -> dict[str, Any]:
    """Return what lm-eval finds; what it cannot do is one sentence."""
    import lm_eval
    from lm_eval import evaluator

    evaluator.get_git_commit_hash = lambda: None  # git complains on the console where there is no repository
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
        if "confirm_run_unsafe_code" in reason:
            reason = "one of them runs programs without limits; evatune_humaneval and evatune_mbpp have some"
        raise EvaError(f"lm-eval cannot score {', '.join(names)}: {reason.rstrip('.')}.") from error
    assert found is not None
    return found


@contextlib.contextmanager
def _definitions(names: Sequence[str], *, copies: str | None, runs_programs: bool) -> Iterator[Path]:
    """Give the folder of the definitions, or one where they are changed.

    Args:
        names: of tasks and groups that will be scored.
        copies: folder from which these read their data.
        runs_programs: our tasks may run programs, which lm-eval would refuse; its own tasks still may not.
    """
    if copies is None and not runs_programs:
        yield DEFINITIONS
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in DEFINITIONS.glob("[!_]*.yaml"):
            task, text = _NAMED.get(path.stem), path.read_text(encoding="utf-8")
            if task is not None:
                changes: dict[str, Any] = {"unsafe_code": False} if _runs_programs(path) and runs_programs else {}
                if copies is not None and {_name(path), f"{_PREFIX}{task.partition('/')[0]}"} & set(names):
                    changes |= _from_disk(task, copies)
                text = json.dumps({"include": str(path), **changes}, ensure_ascii=False)  # JSON is YAML too
            (folder / path.name).write_text(text, encoding="utf-8")
        yield folder


def _notes_on_programs(names: Sequence[str], *, allowed: bool) -> list[str]:
    """Return what limits programs of the model, if one of our tasks runs them."""
    running = [name for path in DEFINITIONS.glob("*.yaml") if _runs_programs(path) and (name := _name(path)) in names]
    if running and not allowed:
        raise EvaError(f"{running[0]} runs programs that the model writes; allow it with --allow-code-execution.")
    return [report()] if running else []


def _runs_programs(path: Path) -> bool:
    return "include: _programs.yaml" in path.read_text(encoding="utf-8")


def _name(path: Path) -> str:
    """Return the name that a definition's file gives to its task."""
    return _PREFIX + path.stem.replace("-", "_").replace("+", "_plus")


def _from_disk(task: str, folder: str) -> dict[str, Any]:
    """Return what makes lm-eval read the held-out rows of a task from their copy."""
    files = copies_of(task, folder=folder, held_out=True)
    if len({file.suffix for file in files}) > 1:
        raise EvaError(f"the copies of task {task!r} have several endings ({', '.join(map(str, files))}); keep one.")
    loader = _LOADERS[files[0].suffix]
    kwargs = loader.get("dataset_kwargs", {}) | {"data_files": {"test": [str(file) for file in files]}}
    return loader | {"dataset_name": None, "test_split": "test", "dataset_kwargs": kwargs}
