"""Calling transformers: its long errors in one sentence, its progress bars silent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from evatune.errors import EvaError, near_misses
from evatune.models.reach import hub_in_reach


def check_choice(what: str, value: str, known: dict[str, Any]) -> None:
    """Raise an `EvaError` unless `value` is one of the known ones."""
    if value not in known:
        raise EvaError(f"{what} is {value!r}, but must be one of {', '.join(known)}{near_misses(str(value), known)}.")


@contextlib.contextmanager
def explained(name: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn the many-line errors of a failed load into one sentence, which comes at once where there is no network."""
    try:
        with contextlib.nullcontext() if _is_here(name) else hub_in_reach():
            yield
    except (EvaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file fails in any way: KeyError, SafetensorError, tokenizers' own Exception
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "instantiate the backend tokenizer" in reason:
            raise EvaError(f"the model {os.fspath(name)!r} has no tokenizer, so it reads no text.") from error
        where = "" if _is_here(name) else "it is no folder here, and the hub says: "
        raise EvaError(f"cannot load the {what} of {os.fspath(name)!r}: {where}{reason.rstrip('.')}.") from error


def _is_here(name: str | os.PathLike[str]) -> bool:
    """Return whether a model's name means files on this machine."""
    return os.fspath(name).startswith("package:") or Path(name).expanduser().exists()


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch off the progress bars of transformers, such as the one for loading weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
