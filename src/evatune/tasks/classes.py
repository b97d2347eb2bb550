"""The classes that a model tells apart, kept beside it, so that it is not scored on data of other classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from evatune.errors import EvaError
from evatune.files import write_text

CLASSES = "classes.json"

_NAMED = 5
"""Classes that a message names."""


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """Write the names of a model's classes, in the order of its outputs, into the folder where it is saved."""
    write_text(folder / CLASSES, json.dumps(list(classes), ensure_ascii=False, indent=2) + "\n")


def check_classes(folder: Path, classes: Sequence[str], *, way_out: str) -> None:
    """Check that a folder, if it holds the names of a model's classes, holds these.

    Args:
        folder: where a model may have been saved.
        classes: those of the data, in the order of the outputs.
        way_out: what the user can do, at the end of the message.

    Raises:
        EvaError: the model tells other classes apart, or has them in another order.
    """
    if not (folder / CLASSES).is_file():
        return
    kept = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
    if kept != list(classes):
        raise EvaError(
            f"what is in {folder} was trained for {_named(kept)}, but the data have {_named(classes)}; {way_out}."
        )


def _named(classes: Sequence[str]) -> str:
    more = ", ..." if len(classes) > _NAMED else ""
    return f"{len(classes)} classes ({', '.join(classes[:_NAMED])}{more})"
