"""A journal of an evaluation: what is known of which example, so that a stopped evaluation goes on where it was.

It is a file of JSON lines. The first line says what is evaluated; every other line holds what one batch gave.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from evatune.errors import EvaError
from evatune.files import json_text, write_text


class Journal:
    """What an evaluation has found so far, by its part and the place of the example.

    Example:
        >>> with Journal.open("outcomes.part", about={"model": "gpt2"}) as journal:
        ...     journal.add("likelihood", [(0, 1.5), (1, 2.5)])
        >>> with Journal.open("outcomes.part", about={"model": "gpt2"}, resume=True) as journal:
        ...     journal.known("likelihood")
        {0: 1.5, 1: 2.5}
    """

    def __init__(self, file: Any = None, known: dict[str, dict[int, Any]] | None = None) -> None:
        self._file = file
        self._known = known or {}

    @classmethod
    def open(cls, path: str | Path, *, about: Any, resume: bool = False) -> Self:
        """Begin a journal, or go on with one.

        Args:
            path: the file.
            about: plain values that tell what is evaluated.
            resume: go on with the file if it exists; a last line that was not finished is dropped.

        Raises:
            EvaError: the journal is of another evaluation.
        """
        path = Path(path).expanduser()
        known: dict[str, dict[int, Any]] = {}
        head = json_text({"about": about})
        if resume and path.is_file():
            kept = path.read_bytes().rpartition(b"\n")[0].decode().splitlines()
            if kept and json.loads(kept[0]) != json.loads(head):
                raise EvaError(
                    f"{path} is of another evaluation (another model, adapter or recipe); leave out --resume to start "
                    "again, or choose another file."
                )
            for line in kept[1:]:
                entry = json.loads(line)
                known.setdefault(entry["part"], {}).update({int(index): value for index, value in entry["found"]})
        else:
            kept = []
        write_text(path, "".join(line + "\n" for line in kept or [head]))  # what was kept is never half there
        return cls(path.open("a", encoding="utf-8"), known)

    def known(self, part: str) -> dict[int, Any]:
        """Return what is known of a part of the evaluation, by the place of the example."""
        return self._known.setdefault(part, {})

    def add(self, part: str, found: Iterable[tuple[int, Any]]) -> None:
        """Keep what one batch gave; it is on disk when this returns."""
        found = list(found)
        self.known(part).update(found)
        if self._file is not None:
            self._file.write(json_text({"part": part, "found": found}) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.close()
