"""Statistics of scores that depend on a task and on a seed.

The scores of a method are an array over seeds for each task. Intervals resample the seeds of each task apart from those
of the others (a stratified bootstrap). The interquartile mean is taken over all tasks and seeds together, as Agarwal et
al. (2021, arXiv:2108.13264) recommend for few runs. Differences of two methods are paired by seed and example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

N_RESAMPLES = 2000
Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    interval: tuple[float, float] | None
    """None where nothing can be resampled: a single seed."""


def interquartile_mean(scores: Array) -> float:
    """Return the mean of the middle half of all scores."""
    ordered = np.sort(np.concatenate([np.ravel(task) for task in scores]))
    cut = len(ordered) // 4  # as `scipy.stats.trim_mean`, which takes a hundred times as long for a few numbers
    return float(ordered[cut : len(ordered) - cut].mean())


def stratified(
    statistic: Callable[..., float], *methods: Sequence[Array], seed: int = 0, n_resamples: int = N_RESAMPLES
) -> Estimate:
    """Return a statistic with its bootstrap interval (percentile method), resampled over the seeds of each task.

    Args:
        statistic: takes the scores of each method: for each task an array over its seeds.
        methods: these scores; methods are resampled apart from each other.
        seed: of the resampling.
        n_resamples: how often.

    Cost: `n_resamples` evaluations of the statistic.
    """
    value = statistic(*methods)
    if any(len(task) < 2 for method in methods for task in method):
        return Estimate(value=value, interval=None)
    rng = np.random.default_rng(seed)
    drawn = [
        statistic(*([rng.choice(task, len(task)) for task in method] for method in methods)) for _ in range(n_resamples)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value=value, interval=(float(low), float(high)))


def probability_of_improvement(first: Sequence[Array], second: Sequence[Array]) -> float:
    """Return how probable it is that a run of the first method scores higher than one of the second, mean over tasks.

    Equal scores count half: this is the Mann-Whitney statistic divided by the number of pairs.
    """
    shares = [
        np.mean(np.sign(np.subtract.outer(ours, theirs)) / 2 + 0.5) for ours, theirs in zip(first, second, strict=True)
    ]
    return float(np.mean(shares))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much better one method is than another, paired by seed and example."""

    estimate: Estimate
    p: float
    """Two-sided, of no difference."""
    n_pairs: int
    """Examples of all seeds."""
    n_seeds: int


def paired_difference(pairs: Sequence[Array], *, seed: int = 0, n_resamples: int = N_RESAMPLES) -> Difference:
    """Return the mean of paired differences with an interval and a p-value by a bootstrap of two levels.

    Seeds are drawn first, then examples of each: a difference that one lucky seed made is not taken for one of methods.
    With a single seed only examples are drawn.

    Args:
        pairs: for each seed the differences of the outcomes of its examples.
        seed: of the resampling.
        n_resamples: how often; no p-value is below 2 / (n_resamples + 1).
    """
    rng = np.random.default_rng(seed)
    value = float(np.mean([np.mean(one) for one in pairs]))
    drawn = np.empty(n_resamples)
    for number in range(n_resamples):
        chosen = rng.integers(len(pairs), size=len(pairs))
        drawn[number] = np.mean([np.mean(rng.choice(pairs[index], len(pairs[index]))) for index in chosen])
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
    return Difference(
        estimate=Estimate(value=value, interval=(float(low), float(high))),
        p=min(1.0, 2 * (float(tail) + 1) / (n_resamples + 1)),
        n_pairs=sum(len(one) for one in pairs),
        n_seeds=len(pairs),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for many comparisons by Holm's step-down method."""
    order = np.argsort(p_values)
    corrected, largest = np.empty(len(p_values)), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Mean ranks of methods over blocks, with the critical difference of Nemenyi's test."""

    ranks: Mapping[str, float]
    """Mean rank, 1 is best; equal scores share their ranks."""
    critical_difference: float
    """Two methods whose mean ranks differ by less cannot be told apart (5% level)."""
    p: float
    """Of Friedman's test that all methods are alike."""
    n_blocks: int


def mean_ranks(scores: Mapping[str, Sequence[float]]) -> Ranking:
    """Return the mean ranks of methods over blocks in which each has one score (Demšar, 2006).

    Args:
        scores: for each method its score in each block; higher is better.
    """
    table = np.array(list(scores.values()), dtype=float)  # (methods, blocks)
    n_methods, n_blocks = table.shape
    ranks = stats.rankdata(-table, axis=0).mean(axis=1)
    quantile = stats.studentized_range.ppf(0.95, n_methods, 1e6) / math.sqrt(2)
    differ = n_methods > 2 and n_blocks > 1 and bool(np.ptp(table, axis=0).any())
    return Ranking(
        ranks=dict(zip(scores, ranks.tolist(), strict=True)),
        critical_difference=float(quantile * math.sqrt(n_methods * (n_methods + 1) / (6 * n_blocks))),
        p=float(stats.friedmanchisquare(*table).pvalue) if differ else math.nan,
        n_blocks=n_blocks,
    )
