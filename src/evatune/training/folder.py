"""The folder of a run: its files, whether it may be written, and what it may be resumed with."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evatune.errors import EvaError
from evatune.files import check_takes_files, check_writable, damaged_files, write_failure, write_text, writing
from evatune.recipe import Recipe, TrainSettings, load_recipe

RECIPE, SPECTRA, PLAN, LOG, RECORD = "recipe.yaml", "spectra", "plan.json", "log.jsonl", "run.json"
INITIAL, CHECKPOINTS, ADAPTER, MODEL = "initial_adapter", "checkpoints", "adapter", "model"

FREE = {"output", "measure.spectra", "train.threads", "model.config", "data.train_size"}
FREE |= {f"train.{name}" for name in ("logging_steps", "eval_steps", "save_steps", "keep_checkpoints")}
"""Settings that may change when a run is resumed: they change neither weights nor scores."""
LENGTH = {"train.steps", "train.epochs"}
"""Settings that may change too, since a run can be extended: what is left follows the schedule of the new length."""


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Check the output folder before any long work; an empty one counts as new, and only a run is overwritten."""
    if not folder.is_dir() or any(folder.iterdir()):
        check_writable(folder, overwrite=overwrite, holds=RECIPE)
    check_takes_files(folder)


def start_folder(folder: Path, recipe: Recipe) -> None:
    """Make the folder anew, with the recipe in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)  # a disk that is mounted here stays
    write_text(folder / RECIPE, recipe.to_yaml())


def check_still_there(folder: Path) -> None:
    """Check that the folder of a run that goes on was not removed or moved meanwhile.

    Raises:
        EvaError: it was, so that what would be written into it now is not a whole run.
    """
    if not (folder / RECIPE).is_file():
        raise EvaError(
            f"{folder} was removed or moved while the run went on, so its results have no place; put it back and go "
            "on with --resume, or start again."
        )


@contextmanager
def writing_run(folder: Path) -> Iterator[None]:
    """Turn failures of writing into a run's folder into one sentence, and leave no half-written checkpoint.

    Raises:
        EvaError: the disk is full, read-only or gone.
    """
    said_in_threads = threading.excepthook

    def say_in_thread(args: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread of its own, whose failures it raises in this one too.
        if args.exc_value is None or not write_failure(args.exc_value, folder):
            said_in_threads(args)

    threading.excepthook = say_in_thread
    try:
        with writing(folder, way_out="make room there, then go on with --resume"):
            yield
    except EvaError:
        check_still_there(folder)
        for checkpoint in (folder / CHECKPOINTS).glob("checkpoint-*"):
            if damaged_files(checkpoint) is None:  # not written to its end, so it only takes room
                shutil.rmtree(checkpoint, ignore_errors=True)
        raise
    finally:
        threading.excepthook = said_in_threads


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Check that a run goes on with the settings that it was started with.

    Raises:
        EvaError: the folder holds no run, or one with other settings.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise EvaError(f"{folder} holds no run to resume: it has no {RECIPE}.")
    if changed := changed_settings(load_recipe(path).to_dict(), recipe.to_dict(), free=FREE | LENGTH):
        raise EvaError(f"cannot resume {folder} with another recipe: {'; '.join(changed)}.")


def changed_settings(old: dict[str, Any], new: dict[str, Any], *, free: Collection[str] = FREE) -> list[str]:
    """Return a phrase for each setting in which two recipes differ, but for those that may.

    Args:
        old: what `Recipe.to_dict` returned.
        new: the same of the other.
        free: settings that may differ.
    """
    old, new = _flat(old), _flat(new)
    return [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in old | new
        if key not in free and old.get(key) != new.get(key)
    ]


def saved_train_settings(folder: Path) -> TrainSettings:
    """Return the training settings that a run was started or last extended with."""
    return load_recipe(folder / RECIPE).train


def check_length(folder: Path, *, n_steps: int) -> None:
    """Check that a run which goes on can end after so many steps.

    Raises:
        EvaError: it has done as many already, or it is finished and kept no state to go on from.
    """
    steps = [checkpoint_step(path) for path in (folder / CHECKPOINTS).glob("checkpoint-*")]
    if (folder / RECORD).is_file():
        if not steps:
            raise EvaError(
                f"{folder} is finished and kept no checkpoint, so it cannot be extended; start again with more steps."
            )
        n_steps -= 1
    if max(steps, default=0) > n_steps:
        raise EvaError(f"{folder} has done {max(steps)} steps already; give more --steps than these, or start again.")


def go_on(folder: Path, recipe: Recipe) -> None:
    """Note that a run goes on with this recipe: it is not finished any more."""
    write_text(folder / RECIPE, recipe.to_yaml())
    (folder / RECORD).unlink(missing_ok=True)


def last_checkpoint(folder: Path, *, say: Callable[[str], None]) -> Path | None:
    """Return the newest complete and undamaged checkpoint of a run; its checksums, which are written last, tell.

    Args:
        folder: the run's folder.
        say: is told of checkpoints that are damaged.
    """
    for checkpoint in sorted((folder / CHECKPOINTS).glob("checkpoint-*"), key=checkpoint_step, reverse=True):
        damaged = damaged_files(checkpoint)
        if damaged == []:
            return checkpoint
        why = "was not written to its end" if damaged is None else f"is damaged ({', '.join(damaged)})"
        say(f"passed    {checkpoint.name}, which {why}")
    return None


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
