"""The folder of a sweep's results: one file of records, to which every finished run adds a line.

sweep.json      what was asked for
records.jsonl   a line for each run: settings, scores, outcomes, log, times, machine, or why there are none; what runs
                share has lines of its own (`evatune.compare.packing`)
choices.json    of each method on each task: the chosen setting, the scores of all that were tried
runs/           the folders of the runs; their adapters stay only where the sweep says so
spectra/        what was measured, once for all runs that start from the same spectra
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evatune.compare.packing import Packer
from evatune.compare.runs import Run
from evatune.errors import EvaError
from evatune.files import check_takes_files, user_cache, write_json, write_text
from evatune.recipe import Recipe
from evatune.training.folder import changed_settings
from evatune.training.record import library_versions

SWEEP, RECORDS, CHOICES, RUNS, SPECTRA, LOCK = "sweep.json", "records.jsonl", "choices.json", "runs", "spectra", ".lock"

Record = dict[str, Any]
"""A line of the file: see `record_of`."""

_STATED = ("learning_rate", "epoch")
"""Entries of a log that the recipe and its schedule state anyway; without them a record is a fifth smaller."""


class Results:
    """What a folder of results holds.

    Args:
        folder: the folder.

    Raises:
        EvaError: a line of its records cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._packer = Packer()
        self.records: dict[str, Record] = {record["name"]: record for record in self._read(self.folder / RECORDS)}
        """The newest record of each run, by its name."""

    def add(self, record: Record) -> None:
        """Write a record to its end, so that it stays whatever happens next."""
        with (self.folder / RECORDS).open("a", encoding="utf-8") as file:
            file.write(self._packer.lines(record))
            file.flush()
            os.fsync(file.fileno())
        self.records[record["name"]] = record

    def find(self, run: Run) -> Record | None:
        """Return the record of a run, or None if it is still to be done.

        Raises:
            EvaError: a run of this name was made with other settings, or with a file that is not there now.
        """
        record = self.records.get(run.name)
        if record is None:
            return None
        if changed := changed_settings(_with_new_settings(record["recipe"]), self.recipe_of(run)):
            files = [os.path.normpath(self.folder / path) for path in _paths_in(record["recipe"]["data"])]
            if missing := next((file for file in files if not os.path.exists(file)), None):
                raise EvaError(
                    f"{self.folder} holds {run.name}, which was made with {missing}, and this file is not there; put "
                    "it back, or choose another output."
                )
            raise EvaError(
                f"{self.folder} holds {run.name} of another sweep: {'; '.join(changed)}; choose another output, or "
                f"remove the line from {RECORDS}."
            )
        return record

    def recipe_of(self, run: Run) -> dict[str, Any]:
        """Return the recipe of a run as its record has it."""
        return portable(run.recipe.with_absolute_paths().to_dict(), self.folder)

    @property
    def metric(self) -> str | None:
        """The metric that the sweep asks for; None if it is each task's headline."""
        return self._asked.get("metric")

    @property
    def groups(self) -> dict[str, str]:
        """The group of each task that the sweep gives one."""
        recipes = self._asked.get("recipes", {})
        return {task: given["group"] for task, given in recipes.items() if isinstance(given, dict) and "group" in given}

    @property
    def _asked(self) -> dict[str, Any]:
        path = self.folder / SWEEP
        return json.loads(path.read_text(encoding="utf-8"))["sweep"] if path.is_file() else {}

    @property
    def choices(self) -> list[dict[str, Any]]:
        """What was chosen for each method on each task; see `evatune.compare.choosing.Choice.to_json`."""
        path = self.folder / CHOICES
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def write_choices(self, choices: list[dict[str, Any]]) -> None:
        """Write what was chosen so far."""
        write_json(self.folder / CHOICES, choices, indent=1)

    @contextlib.contextmanager
    def writing(self, sweep: Mapping[str, Any], *, force: bool = False) -> Iterator[None]:
        """Keep other processes from writing into the folder while the block runs.

        Args:
            sweep: what was asked for.
            force: add to the results of another version of evatune.

        Raises:
            EvaError: another process writes there, the results are those of another version, or the folder cannot be
                written.
        """
        version = library_versions()["evatune"]
        others = {record["versions"].get("evatune", version) for record in self.records.values()} - {version}
        if others and not force:
            raise EvaError(
                f"{self.folder} holds runs of evatune {', '.join(sorted(others))}, and this is {version}; choose "
                "another output, or --force to add to them."
            )
        check_takes_files(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("w") as lock:
            _take(lock, self.folder)
            if (self.folder / RECORDS).is_file():  # without half a line of a crash, and short if it was written long
                self._packer = Packer()
                write_text(self.folder / RECORDS, "".join(map(self._packer.lines, self.records.values())))
            asked = {key: value for key, value in sweep.items() if key != "output"}  # the folder may be moved
            write_json(self.folder / SWEEP, {"evatune": version, "sweep": portable(asked, self.folder)}, indent=1)
            yield

    def _read(self, path: Path) -> Iterator[Record]:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                record = self._packer.read(line)
            except (ValueError, KeyError, TypeError):
                if number == len(lines):  # a crash cut it short: the run is done again
                    return
                raise EvaError(
                    f"{path}, line {number} is no record of a run; remove it, and the run is done again."
                ) from None
            if record is not None:
                yield record


def record_of(
    run: Run,
    results: Results,
    *,
    state: str,
    seconds: float,
    tries: int,
    reason: str = "",
    folder: Path | None = None,
) -> Record:
    """Return the record of a run.

    Args:
        run: the run.
        results: where the record will be.
        state: `done`, `refused` (an error that its sentence explains) or `failed` (the process died or broke).
        seconds: time of the whole run, loading included.
        tries: how often it was started.
        reason: why there are no scores.
        folder: where its own record is.

    Returns:
        Plain values without the machine's paths. Outcomes of single examples, all columns, are those of test runs.
    """
    cell = run.cell
    record: Record = {
        "name": run.name,
        "state": state,
        "stage": run.stage,
        "task": cell.task.name,
        "model": cell.model_label,
        "method": cell.label,
        "point": dict(run.point),
        "seed": run.seed,
        "tries": tries,
        "wall_seconds": round(seconds, 1),
        "recipe": results.recipe_of(run),
        "versions": library_versions(),
    }
    if folder is None:
        return record | {"reason": reason}
    content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    skipped = ("recipe", "before", "after", "log")
    record |= {key: value for key, value in content.items() if key not in skipped}
    record["log"] = [
        {key: _rounded(value) for key, value in entry.items() if key not in _STATED} for entry in content["log"]
    ]
    for when in ("before", "after"):
        record[when] = short = _rounded(content[when], digits=6)
        path = folder / f"{when}.json"
        if run.stage == "test" and path.is_file():
            outcomes = json.loads(path.read_text(encoding="utf-8"))["outcomes"]
            record[when] = short | {"outcomes": _rounded(outcomes, digits=4)}
    return record


def portable(value: Any, folder: Path) -> Any:
    """Return plain values without the machine's paths.

    Paths below known folders begin with the variable that recipes have for them; other ones that exist are taken from
    the folder of the results, wherever the command was given.
    """
    if isinstance(value, Mapping):
        return {key: portable(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item, folder) for item in value]
    if not isinstance(value, str):
        return value
    roots = {"EVATUNE_DATA": os.environ.get("EVATUNE_DATA"), "EVATUNE_CACHE": str(user_cache())}
    for name, given in roots.items():
        for root in (given.rstrip("/"), os.path.abspath(given)) if given else ():
            if value == root or value.startswith(root + "/"):
                return f"${{{name}}}" + value[len(root) :]
    if "/" in value and os.path.exists(value):
        return os.path.relpath(value, folder)
    return value


def _paths_in(value: Any) -> Iterator[str]:
    """Return the paths in what `portable` returned; a name of a hub begins with neither a dot nor a variable."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _paths_in(item)
    elif isinstance(value, str) and value.startswith(("../", "${")):
        yield value.replace("${EVATUNE_CACHE}", str(user_cache())).replace(
            "${EVATUNE_DATA}", os.environ.get("EVATUNE_DATA") or "${EVATUNE_DATA}"
        )


def is_whole(record: Record) -> bool:
    """Return whether a run is done and went to its end in one go, so that its times are those of all of it.

    A run that goes on has its adapter already, and prepares none.
    """
    return record["state"] == "done" and "prepare" in record["seconds"]


def _with_new_settings(content: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with the defaults of settings that have come since; as it was if some have gone."""
    try:
        return Recipe.from_dict(content).to_dict()
    except EvaError:
        return content


def _take(lock: Any, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise EvaError(f"another process writes into {folder}; wait for it, or choose another output.") from None


def _rounded(value: Any, digits: int = 5) -> Any:
    """Return numbers with so many significant digits, for files that stay small."""
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    if not isinstance(value, float):
        return value
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e6 else short
