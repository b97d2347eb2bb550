"""Scoring with lm-evaluation-harness: its own tasks, and those of this package with the paper's prompts.

The definitions of the latter are files in `lm_eval/` beside this module, which any lm-evaluation-harness reads with
`--include_path`: `evatune_commonsense`, its eight tasks, and `evatune_gsm8k`.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evatune.errors import EvaError, near_misses
from evatune.tasks.generation.named import NAMED, places

if TYPE_CHECKING:
    from evatune.tasks.generation.task import Generation

DEFINITIONS = Path(__file__).parent / "lm_eval"
"""Folder of the task definitions."""
_PREFIX = "evatune_"


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
        EvaError: lm-eval is not installed, there is no such task, or its data cannot be loaded.
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
    with _definitions(task.data.folder) as folder:
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
        was_training = model.training
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
        finally:
            model.train(was_training)
    assert found is not None
    wanted = ("results", "groups", "versions", "n-samples", "samples")
    content = {name.replace("-", "_"): found[name] for name in wanted if name in found}
    return content | {"seconds": time.perf_counter() - started, "lm_eval": lm_eval.__version__}


@contextlib.contextmanager
def _definitions(copies: str | None) -> Iterator[Path]:
    """Give the folder of the definitions; with copies of the data on disk, one whose tasks read them."""
    if copies is None:
        yield DEFINITIONS
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in DEFINITIONS.glob("[!_]*.yaml"):
            task = path.stem if path.stem in NAMED else f"commonsense/{path.stem}"
            lines = [f"include: {path}"]
            if task in NAMED and (files := _copies(task, copies)):
                lines += ["dataset_path: json", "dataset_name: null", "test_split: test"]
                lines += [f"dataset_kwargs: {{data_files: {{test: {files}}}}}"]
            if task not in NAMED:
                lines = [path.read_text(encoding="utf-8")]
            (folder / path.name).write_text("\n".join(lines), encoding="utf-8")
        yield folder


def _copies(task: str, folder: str) -> list[str]:
    """Return the files with the held-out rows of a task, if they are there."""
    try:
        return [str(place["name"]) for place in places([task], folder=folder, held_out=True)[task]]
    except EvaError:
        return []
