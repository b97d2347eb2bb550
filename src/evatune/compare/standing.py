"""How the methods of a sweep stand: the test scores of each at its chosen setting, or why there are none."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from evatune.compare.choosing import score
from evatune.compare.results import Record, Results
from evatune.tables import CAPTION_WIDTH, Table


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One method on one task."""

    task: str
    model: str
    method: str
    point: dict[str, Any] | None
    """The setting that was chosen on validation data."""
    open: list[str]
    """Searched settings whose best value was at the end of their grid."""
    scores: dict[int, float]
    """Test score by seed."""
    n_seeds: int
    """Seeds that were asked for."""
    metric: str
    """What the score is."""
    trainable: int | None
    """Trainable parameters."""
    reason: str = ""
    """Why scores are missing."""
    group: str = ""
    """Group of the task."""
    records: list[Record] = field(default_factory=list, repr=False)
    """The runs on test data."""

    @property
    def notes(self) -> list[str]:
        """What a reader of the score must know."""
        ends = [f"best value at the end of the grid of {path.rpartition('.')[2]}" for path in self.open]
        return [
            *([self.reason.rstrip(".")] if self.reason else []),
            *ends,
            *(["one seed, so no interval"] if len(self.scores) == 1 else []),
        ]

    @property
    def title(self) -> str:
        """Task, with its model where there are several."""
        return title_of(self.task, self.model)

    @property
    def mean(self) -> float | None:
        """Mean over seeds."""
        return statistics.fmean(self.scores.values()) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1 in the denominator); None for a single one."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Standings:
    """All methods on all tasks."""

    rows: Sequence[Standing]

    def text(self, *, width: int | None = None) -> str:
        """Return a table for a terminal of this width, with what must be known of single methods below it."""
        rows: list[list[object]] = []
        notes: dict[str, list[str]] = {}
        for row in self.rows:
            score = "–" if row.mean is None else f"{row.mean:.4f}"
            score += f" ± {row.deviation:.4f}" if row.deviation is not None else ""
            seeds = f"{len(row.scores)} of {row.n_seeds}"
            rows.append([row.title, row.method, score, seeds, row.trainable, shown_point(row.point or {}) or None])
            for note in row.notes:
                notes.setdefault(note, []).append(f"{row.title} {row.method}")
        headers = ["task", "method", "test score", "seeds", "parameters", "chosen"]
        table = Table(headers=headers, rows=rows).text(width=width)
        lines = [f"{note}: {', '.join(names) if len(names) < len(rows) else 'all'}" for note, names in notes.items()]
        below = [textwrap.fill(line, width or CAPTION_WIDTH, subsequent_indent="  ") for line in lines]
        return "\n".join([table, *([""] if below else []), *below])

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the records."""
        rows = []
        for row in self.rows:
            content = {part.name: getattr(row, part.name) for part in fields(row) if part.name != "records"}
            rows.append(content | {"mean": row.mean, "deviation": row.deviation})
        return {"standings": rows}


def shown_point(point: Mapping[str, Any]) -> str:
    """Return searched settings as a text: `learning_rate 0.005`."""
    shown = {path: f"{value:g}" if isinstance(value, float) else value for path, value in point.items()}
    return ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in shown.items())


def title_of(task: str, model: str) -> str:
    """Return what tables call a task: its name, and that of the model where there are several."""
    return f"{task} {model}".strip()


def standings(results: Results, *, metric: str | None = None) -> Standings:
    """Return how the methods stand; what is not done yet is missing and said so.

    Args:
        results: a folder of results.
        metric: the metric; by default that of the sweep, which is each task's headline where it names none.
    """
    metric, groups = metric or results.metric, results.groups
    rows = []
    for choice in results.choices:
        name = (choice["task"], choice["model"], choice["method"])
        own = [r for r in results.records.values() if (r["task"], r["model"], r["method"]) == name]
        test = [r for r in own if r["stage"] == "test" and r["point"] == choice["point"]]
        scores = {r["seed"]: value for r in test if (value := score(r, metric)) is not None}
        done = next((r for r in test if r["state"] == "done"), None)
        rows.append(
            Standing(
                task=choice["task"],
                model=choice["model"],
                method=choice["method"],
                point=choice["point"],
                open=choice["open"],
                scores=scores,
                n_seeds=choice["test_seeds"],
                metric=metric or (done["after"]["headline"] if done else ""),
                trainable=done["parameters"]["trainable"] if done else None,
                reason=_why_missing(own, test, scores, is_over=not choice["missing"]),
                group=groups.get(choice["task"], ""),
                records=test,
            )
        )
    return Standings(rows=rows)


def _why_missing(runs: Sequence[Record], test: Sequence[Record], scores: Mapping[int, float], *, is_over: bool) -> str:
    """Return why test scores are missing; an empty text where none is.

    Args:
        runs: all runs of a method on a task.
        test: those on test data at its chosen setting.
        scores: the scores of these, by seed.
        is_over: no run is left to do.
    """
    if not runs:
        return "not run yet"
    if not scores:
        without = "no score is finite" if is_over else "not finished"
        return next((run["reason"] for run in runs if run["state"] != "done"), without)
    return next((run.get("reason") or "its score is not finite" for run in test if run["seed"] not in scores), "")
