"""The test scores of a sweep side by side: methods × tasks × seeds, all so that higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evatune.compare.standing import Standing, title_of
from evatune.errors import EvaError, near_misses
from evatune.tables import text_table
from evatune.tasks.scores import is_better_higher

REFERENCE = "lora"
"""The method that others are compared with by default."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """The scores of a sweep."""

    rows: Sequence[Standing]

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks, with their models where there are several."""
        return list(dict.fromkeys(row.title for row in self.rows))

    @cached_property
    def methods(self) -> list[str]:
        """Methods in the order of the sweep."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def at(self, method: str, task: str) -> Standing | None:
        """Return one method on one task."""
        return next((row for row in self.rows if row.method == method and row.title == task), None)

    def metric(self, task: str) -> str:
        """Return what the scores of a task are."""
        return next((row.metric for row in self.rows if row.title == task and row.metric), "")

    def sign(self, task: str) -> int:
        """Return 1 where a higher score is a better one, else -1."""
        return 1 if is_better_higher(self.metric(task)) else -1

    @cached_property
    def complete(self) -> list[str]:
        """The methods that have a score on every task."""
        return self._scored(self.tasks)

    def values(self, method: str) -> list[np.ndarray]:
        """Return a complete method's scores over seeds, for each task, with higher ones better.

        Where tasks have different metrics, the untuned model is 0 and the best mean of any method 1.
        """
        return [self._values(method, task) for task in self.tasks]

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The tasks of each group, with their models where there are several."""
        found: dict[str, dict[str, None]] = {}
        for row in self.rows:
            if row.group:
                found.setdefault(title_of(row.group, row.model), {})[row.title] = None
        return {name: list(tasks) for name, tasks in found.items()}

    @cached_property
    def means(self) -> dict[str, dict[str, float]]:
        """Means of `values`: over the tasks of each group, over the groups, and over all tasks.

        Each is a mean by method, of the methods that have a score on every task of it.
        """
        groups = {mean_of(name): self._mean(tasks) for name, tasks in self.groups.items()}
        found = dict(groups)
        if len(groups) > 1:
            shared = [m for m in self.methods if all(m in group for group in groups.values())]
            found["mean of groups"] = {m: float(np.mean([group[m] for group in groups.values()])) for m in shared}
        if len(self.tasks) > 1:
            found["mean"] = self._mean(self.tasks)
        return found

    def tasks_of(self, mean: str) -> list[str]:
        """Return the tasks that one of the `means` is over."""
        return next((tasks for name, tasks in self.groups.items() if mean_of(name) == mean), self.tasks)

    @property
    def turn(self) -> int:
        """What turns `values` and `means` back to scores of the metric: -1 where lower is better, unless scaled."""
        return 1 if self.is_scaled else self.sign(self.tasks[0])

    @property
    def shown_means(self) -> dict[str, dict[str, float]]:
        """The means as readers see them: those of a loss are losses."""
        return {name: {m: self.turn * value for m, value in mean.items()} for name, mean in self.means.items()}

    def means_text(self, *, width: int | None = None) -> str:
        """Return the means for a terminal of this width; an empty string where there is one task without a group."""
        means = self.shown_means
        rows = [[m, *(f"{mean[m]:.4f}" if m in mean else None for mean in means.values())] for m in self.methods]
        return text_table(["method", *means], rows, width=width) if means else ""

    def _mean(self, tasks: Sequence[str]) -> dict[str, float]:
        return {m: float(np.mean([self._values(m, task).mean() for task in tasks])) for m in self._scored(tasks)}

    def _scored(self, tasks: Sequence[str]) -> list[str]:
        return [m for m in self.methods if all((row := self.at(m, task)) and row.scores for task in tasks)]

    def _values(self, method: str, task: str) -> np.ndarray:
        row = self.at(method, task)
        assert row is not None
        scores = self.sign(task) * np.array(list(row.scores.values()))
        low, high = self._ends(task) if self.is_scaled else (0.0, 1.0)
        return (scores - low) / (high - low)

    @cached_property
    def is_scaled(self) -> bool:
        """Whether tasks have different metrics, so that scores are scaled before they are averaged."""
        return len({self.metric(task) for task in self.tasks}) > 1

    def untuned(self, task: str) -> float | None:
        """Return the score before training, mean over all test runs of a task; new heads are random."""
        metric = self.metric(task)
        scored = [r["before"] for row in self.rows if row.title == task for r in row.records if r.get("before")]
        values = [value for scores in scored if (value := scores["metrics"].get(metric)) is not None]
        return float(np.mean(values)) if values else None

    def _ends(self, task: str) -> tuple[float, float]:
        rows = [row for row in self.rows if row.title == task]
        sign = self.sign(task)
        low, high = sign * (self.untuned(task) or 0.0), max(sign * row.mean for row in rows if row.mean is not None)
        return (low, high) if high > low else (low, low + 1.0)

    def reference(self, name: str | None = None) -> str:
        """Return the method that others are compared with.

        Raises:
            EvaError: the sweep has no such method.
        """
        name = name or REFERENCE
        found = next((m for m in self.methods if m == name or m.split(" ")[0] == name), None)
        if found is None:
            known = [*self.methods, *(m.split(" ")[0] for m in self.methods)]
            raise EvaError(
                f"these results have no method {name!r} to compare with{near_misses(name, known)}; name one of "
                f"{', '.join(self.methods)} with --against."
            )
        return found


def mean_of(group: str) -> str:
    """Return what tables call the mean over the tasks of a group."""
    return f"{group} (mean)"


def paired_outcomes(ours: Standing, theirs: Standing) -> list[np.ndarray]:
    """Return for each seed of both the differences of the outcomes of its examples, ours minus theirs.

    The outcomes are those of the metric, if it is a mean over examples; otherwise there are none.
    """
    pairs = []
    own = {record["seed"]: record for record in ours.records if record["seed"] in ours.scores}
    for record in theirs.records:
        other = own.get(record["seed"])
        if other is not None and record["seed"] in theirs.scores:
            first, second = _outcomes(other, ours.metric), _outcomes(record, theirs.metric)
            if first is not None and second is not None and len(first) == len(second):
                pairs.append(first - second)
    return pairs


def _outcomes(record: dict, metric: str) -> np.ndarray | None:
    """Return one number an example whose mean is the metric, if there is such a column."""
    wanted = record["after"]["metrics"][metric]
    for column in record["after"].get("outcomes", {}).values():
        values = np.asarray(column, dtype=float)  # one that is not finite is null in the record
        if len(values) and abs(np.mean(values) - wanted) < 1e-3 * max(1.0, abs(wanted)):
            return values
    return None
