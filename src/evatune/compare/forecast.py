"""What a sweep takes before it is done: runs, time and disk, from the runs that were measured already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evatune.compare.choosing import choose
from evatune.compare.results import Results, is_whole
from evatune.compare.runs import Cell, cells, points
from evatune.compare.sweep import Sweep
from evatune.tables import byte_size, duration, text_table


@dataclass(frozen=True, kw_only=True)
class TaskForecast:
    """The runs of one task."""

    task: str
    validation: int
    """Runs on validation data."""
    test: int
    """Runs on test data."""
    done: int
    left: int
    seconds: float | None
    """Of one run; None if none was measured yet."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is still to be done."""

    output: str
    """Folder of the results."""
    runs: list[TaskForecast]
    """The runs of each task."""
    seconds: float | None
    """Time of all runs that are left; None if no run of some task was measured yet."""
    widen: int
    """How often each grid may grow; 0 where nothing is searched."""
    disk_bytes: float | None
    """Size of the folder once all runs are done, with what stays of each of them; None if none is done yet."""

    def text(self) -> str:
        """Return the same for a terminal."""
        rows = [[row.task, row.validation, row.test, row.done, row.left, row.seconds or "unknown"] for row in self.runs]
        table = text_table(
            ["task", "validation runs", "test runs", "done", "left", "seconds a run"], rows, align="lrrrrr"
        )
        time = (
            f"about {duration(self.seconds)} left"
            if self.seconds is not None
            else "time unknown: no run of some task has been measured yet"
        )
        disk = f"about {byte_size(self.disk_bytes)} of disk in all" if self.disk_bytes else "disk unknown"
        total = sum(row.validation + row.test for row in self.runs)
        left = sum(row.left for row in self.runs)
        grows = f"; grids may still grow (`widen: {self.widen}`)" if self.widen else ""
        return f"{table}\n\n{total:,} runs, {left:,} left: {time}, {disk} in {self.output}{grows}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def forecast(sweep: Sweep, *, workers: int = 1) -> Forecast:
    """Return what a sweep takes.

    Args:
        sweep: the sweep; records in its folder are counted as done, and tell how long a run takes.
        workers: runs at a time.

    Raises:
        EvaError: the sweep is wrong, or its folder holds something else.
    """
    results, compared = Results(sweep.output), cells(sweep)
    rows = [
        _of_task(name, [cell for cell in compared if cell.task.name == name], sweep, results) for name in sweep.recipes
    ]
    n_runs = sum(row.validation + row.test for row in rows)
    open_rows = [row for row in rows if row.left]
    seconds = [row.left * row.seconds for row in open_rows if row.seconds is not None]
    files = (path for path in results.folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / len(results.records) if results.records else None
    return Forecast(
        output=sweep.output,
        runs=rows,
        seconds=sum(seconds) / workers if len(seconds) == len(open_rows) else None,
        widen=sweep.widen if any(row.validation for row in rows) else 0,
        disk_bytes=size * n_runs if size else None,
    )


def _of_task(name: str, compared: Sequence[Cell], sweep: Sweep, results: Results) -> TaskForecast:
    stages: Counter[str] = Counter()
    left = 0
    for cell in compared:
        n_test = len(cell.task.test.seeds)
        stages["validation"] += cell.searches * len(points(cell.contender.grid)) * len(cell.task.validation.seeds)
        stages["test"] += n_test
        choice = choose(cell, results.find, metric=sweep.metric, widen=sweep.widen)
        left += len(choice.missing) + (n_test if choice.point is None and choice.missing else 0)
    done = [record for record in results.records.values() if record["task"] == name]
    seconds = [record["wall_seconds"] for record in done if is_whole(record)]
    return TaskForecast(
        task=name,
        validation=stages["validation"],
        test=stages["test"],
        done=len(done),
        left=left,
        seconds=round(sum(seconds) / len(seconds), 1) if seconds else None,
    )
