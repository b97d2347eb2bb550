"""Choosing the best setting of each method on validation data, and growing grids whose best value is at their end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evatune.compare.results import Record
from evatune.compare.runs import Cell, Run, points, runs_of
from evatune.errors import EvaError, near_misses
from evatune.tasks.scores import is_better_higher

Find = Callable[[Run], Record | None]
"""Returns the record of a run, or None."""
DIGITS = 3
"""Significant digits of a value that a grid grows by."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is known of a cell: the runs that are still to be done, and the setting that was chosen."""

    missing: tuple[Run, ...]
    """Runs to do next; after them it is known whether there are more."""
    point: Mapping[str, Any] | None
    """The chosen setting; None if it is not known yet, or no run on validation data has a score."""
    open: tuple[str, ...] = ()
    """Searched settings whose best value is at the end of their grid, although the grid grew as often as it may,
    or a value beyond the end is not allowed."""
    curve: tuple[tuple[Mapping[str, Any], float], ...] = ()
    """Every setting that was tried with its mean score on validation data."""
    metric: str = ""
    """What these scores are; empty where there are none."""

    def to_json(self, cell: Cell) -> dict[str, Any]:
        """Return plain values, with what is compared in the cell."""
        return {
            "task": cell.task.name,
            "model": cell.model_label,
            "method": cell.label,
            "point": None if self.point is None else dict(self.point),
            "open": list(self.open),
            "metric": self.metric,
            "curve": [[dict(point), score] for point, score in self.curve],
            "missing": len(self.missing),
            "test_seeds": len(cell.task.test.seeds),
        }


def choose(cell: Cell, find: Find, *, metric: str | None, widen: int) -> Choice:
    """Return what is next for a cell.

    Args:
        cell: a method on a task.
        find: returns the record of a run that was done.
        metric: the metric to choose by; by default the task's headline.
        widen: how often a grid may grow.
    """
    grid = dict(cell.contender.grid)
    if not cell.searches:
        (point,) = points(grid)
        missing = [run for run in runs_of(cell, "test", point) if find(run) is None]
        return Choice(missing=tuple(missing), point=point)
    for grown in range(widen + 1):
        tried = [(point, [(run, find(run)) for run in runs_of(cell, "validation", point)]) for point in points(grid)]
        missing = [run for _, runs in tried for run, record in runs if record is None]
        if missing:
            return Choice(missing=tuple(missing), point=None)
        scored = [(point, mean_score([record for _, record in runs], metric)) for point, runs in tried]
        curve = tuple((point, score) for point, score in scored if score is not None)
        if not curve:
            return Choice(missing=(), point=None)
        name = metric or next(
            record["after"]["headline"] for _, runs in tried for _, record in runs if record and record.get("after")
        )
        sign = 1 if is_better_higher(name) else -1
        best = max(curve, key=lambda entry: sign * entry[1])[0]
        ends = {path: beyond for path, values in grid.items() if (beyond := _beyond(values, best[path])) is not None}
        allowed = {path: beyond for path, beyond in ends.items() if _is_allowed(cell, {**best, path: beyond})}
        if not allowed or grown == widen:
            break
        grid |= {path: tuple(sorted((*grid[path], beyond))) for path, beyond in allowed.items()}
    missing = [run for run in runs_of(cell, "test", best) if find(run) is None]
    return Choice(missing=tuple(missing), point=best, open=tuple(ends), curve=curve, metric=name)


def score(record: Record, metric: str | None = None) -> float | None:
    """Return a run's score after training; None if it has none, or one that is not finite.

    Raises:
        EvaError: it has other metrics.
    """
    scores = record.get("after")
    if record["state"] != "done" or not scores:
        return None
    name = metric or scores["headline"]
    if name not in scores["metrics"]:
        known = scores["metrics"]
        listed = ", ".join(known)
        raise EvaError(
            f"the runs of {record['task']} have no metric {name!r}{near_misses(name, known)}; they have {listed}."
        )
    value = scores["metrics"][name]
    return value if value is not None and math.isfinite(value) else None


def mean_score(records: list[Any], metric: str | None) -> float | None:
    """Return the mean score of runs; None if one of them has none."""
    scores = [score(record, metric) for record in records]
    known = [value for value in scores if value is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def _is_allowed(cell: Cell, point: Mapping[str, Any]) -> bool:
    """Return whether a run may have these values; a dropout beyond 0.5 would be 2.5."""
    try:
        _ = runs_of(cell, "validation", point)[0].recipe
    except EvaError:
        return False
    return True


def _beyond(values: tuple[Any, ...], best: Any) -> float | None:
    """Return the next value beyond the end of a grid of positive numbers whose best value is there, else None."""
    if len(values) < 2 or not all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in values):
        return None
    ordered = sorted(values)
    if best == ordered[-1]:
        beyond = best * best / ordered[-2]
    elif best == ordered[0]:
        beyond = best * best / ordered[1]
    else:
        return None
    grown = type(best)(float(f"{beyond:.{DIGITS}g}"))
    return grown if grown > 0 and grown not in values else None
