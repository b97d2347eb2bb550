"""What a model scored: named metrics, each computed from outcomes of single examples, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evatune.errors import EvaError, near_misses
from evatune.tasks.statistics import STATISTICS

N_RESAMPLES = 2000
"""Resamples of a bootstrap; another seed then moves the ends of a 95% interval by about 3% of its width."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one number is computed from the outcomes of single examples."""

    columns: tuple[str, ...]
    """Names of the outcomes."""
    statistic: str = "mean"
    """A key of `STATISTICS`."""
    form: str = ".4f"
    """How the number is shown, for example `.1%`."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model scored on held-out examples.

    Example:
        >>> right = Metric(columns=("right",), form=".1%")
        >>> scores = Scores(
        ...     headline="accuracy",
        ...     metrics={"accuracy": right},
        ...     outcomes={"right": [1, 1, 0, 1]},
        ...     counts={"examples": 4},
        ...     seconds=0.1,
        ... )
        >>> scores["accuracy"]
        0.75
    """

    headline: str
    """The metric that is reported first."""
    metrics: Mapping[str, Metric]
    """All metrics by name, without those that these examples do not have (such as accuracy without questions)."""
    outcomes: Mapping[str, Sequence[float]]
    """One number an example, by name; intervals and paired tests are computed from them."""
    counts: Mapping[str, int]
    """Examples, tokens, what was dropped, what could not be parsed, ..."""
    seconds: float
    """Time that it took."""
    notes: Sequence[str] = ()
    """Sentences on how it was scored that a reader of the numbers must know."""
    examples: Sequence[Mapping[str, Any]] = ()
    """Of each example what was asked, `question`, and where the task can tell `expected`, `given` and `right`."""

    def __post_init__(self) -> None:
        for name, metric in self.metrics.items():
            lengths = {len(self.outcomes[column]) for column in metric.columns}
            assert len(lengths) == 1 and 0 not in lengths, f"metric {name!r} needs outcomes of equal length"

    def __getitem__(self, name: str) -> float:
        """Return a metric's value.

        Raises:
            EvaError: there is no metric of this name.
        """
        return float(STATISTICS[self._metric(name).statistic](*self._columns(name)))

    def interval(self, name: str, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
        """Return a bootstrap interval of a metric over examples (percentile method).

        If all of several yes-or-no outcomes are equal, all resamples are equal too. Wilson's interval is returned then
        (20 of 20: 83.9% to 100%).

        Args:
            name: the metric.
            confidence: share of the resamples inside the interval.
            seed: of the resampling.

        Returns:
            Its lower and upper end; None for less than two examples.

        Raises:
            EvaError: there is no metric of this name.

        Cost: `N_RESAMPLES` times the number of examples.
        """
        return self._spread(name, confidence=confidence, seed=seed)[0]

    def standard_error(self, name: str, *, seed: int = 0) -> float | None:
        """Return the standard deviation of a metric over bootstrap resamples; see `interval`."""
        return self._spread(name, confidence=0.95, seed=seed)[1]

    def numbers(self) -> dict[str, float]:
        """Return every metric's value by name, the headline first."""
        names = [self.headline, *(name for name in self.metrics if name != self.headline)]
        return {name: self[name] for name in names if name in self.metrics}

    def to_json(self) -> dict[str, Any]:
        """Return values, intervals, standard errors, counts and seconds as plain values, without the outcomes."""
        spreads = {name: self._spread(name, confidence=0.95, seed=0) for name in self.metrics}
        return {
            "headline": self.headline,
            "metrics": self.numbers(),
            "forms": {name: metric.form for name, metric in self.metrics.items()},
            "intervals": {name: list(ends) for name, (ends, _) in spreads.items() if ends},
            "standard_errors": {name: error for name, (_, error) in spreads.items() if error is not None},
            "counts": dict(self.counts),
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }

    def _spread(
        self, name: str, *, confidence: float, seed: int
    ) -> tuple[tuple[float, float], float] | tuple[None, None]:
        """Return the interval and the standard error of a metric from the same resamples."""
        from scipy.stats import binomtest, bootstrap

        columns, statistic = self._columns(name), self._metric(name).statistic
        n = len(columns[0])
        if n < 2:
            return None, None
        if statistic == "mean" and set(columns[0]) in ({0.0}, {1.0}):
            ends = binomtest(int(columns[0].sum()), n).proportion_ci(confidence, method="wilson")
            return (float(ends.low), float(ends.high)), 0.0
        result = bootstrap(
            columns,
            STATISTICS[statistic],
            n_resamples=N_RESAMPLES,
            batch=max(1, 1_000_000 // n),  # some 8 MB at a time
            vectorized=True,
            paired=True,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        ends = result.confidence_interval
        return (float(ends.low), float(ends.high)), float(result.standard_error)

    def _columns(self, name: str) -> list[np.ndarray]:
        return [np.asarray(self.outcomes[column], dtype=np.float64) for column in self._metric(name).columns]

    def _metric(self, name: str) -> Metric:
        if name not in self.metrics:
            known = ", ".join(self.metrics)
            raise EvaError(f"there is no metric {name!r} here{near_misses(name, self.metrics)}; there are {known}.")
        return self.metrics[name]


def score_rows(scores: Mapping[str, Any]) -> list[list[str]]:
    """Return name, value and 95% interval of each metric as text.

    Args:
        scores: what `Scores.to_json` returned.
    """
    rows = []
    for name, value in scores["metrics"].items():
        form, ends = scores["forms"][name], scores["intervals"].get(name)
        rows.append([name, format(value, form), f"{format(ends[0], form)} to {format(ends[1], form)}" if ends else "–"])
    return rows


def score_line(scores: Mapping[str, Any]) -> str:
    """Return the same on one line."""
    return ", ".join(f"{name} {value} ({interval})" for name, value, interval in score_rows(scores)).replace(" (–)", "")


def measured_by(metric: str) -> str:
    """Return the name of a metric without that of a file or task: `accuracy` of `accuracy/boolq`."""
    return metric.partition("/")[0].partition(" (")[0]


def is_better_higher(metric: str) -> bool:
    """Return whether a larger value of a metric is a better one: not of losses, errors and perplexities.

    Args:
        metric: its name; the name of a file or task may follow (`accuracy/boolq`, `accuracy (test.tsv)`).
    """
    return not any(part in measured_by(metric) for part in ("loss", "error", "perplexity"))
