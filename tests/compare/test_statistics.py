from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evatune.compare.statistics import (
    holm,
    interquartile_mean,
    mean_ranks,
    paired_difference,
    probability_of_improvement,
    stratified,
)


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert interquartile_mean([np.array([0.0, 1.0, 2.0, 1000.0]), np.array([-1000.0, 3.0, 4.0, 5.0])]) == 2.5
    for n in range(1, 12):
        values = np.random.default_rng(n).normal(size=n)
        assert interquartile_mean([values]) == pytest.approx(stats.trim_mean(values, 0.25))


def test_an_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    n_covered = 0
    for number in range(120):
        scores = [rng.normal(task, 1.0, 40) for task in (0.0, 10.0)]
        found = stratified(lambda tasks: float(np.mean(tasks)), scores, seed=number, n_resamples=300)
        low, high = found.interval
        n_covered += low < 5.0 < high
    assert 0.87 < n_covered / 120 < 0.99  # the spread between tasks is no part of it


def test_a_single_seed_has_no_interval():
    found = stratified(interquartile_mean, [np.array([0.5]), np.array([0.7])])
    assert found.interval is None and found.value == pytest.approx(0.6)


def test_probability_of_improvement_is_the_mann_whitney_statistic():
    rng = np.random.default_rng(1)
    first, second = [rng.integers(0, 6, 7).astype(float)], [rng.integers(0, 6, 5).astype(float)]
    expected = stats.mannwhitneyu(first[0], second[0]).statistic / 35
    assert probability_of_improvement(first, second) == pytest.approx(expected)
    assert probability_of_improvement(first, first) == 0.5


def test_paired_differences_find_what_is_there_and_no_more():
    rng = np.random.default_rng(2)
    better = paired_difference([rng.normal(0.1, 1.0, 4000) for _ in range(4)])
    assert better.p < 0.01 and better.estimate.interval[0] > 0 and better.n_pairs == 16000
    seeds = rng.normal(0.0, 1.0, 8)  # seeds differ much more than examples: many examples prove nothing
    nothing = paired_difference([rng.normal(seed - seeds.mean(), 0.01, 500) for seed in seeds])
    assert nothing.p > 0.5
    p_values = [paired_difference([rng.normal(0, 1, 60) for _ in range(5)], n_resamples=300).p for _ in range(60)]
    assert np.mean(np.array(p_values) < 0.05) < 0.15


def test_holm_is_the_published_correction():
    # Worked by hand: sorted 0.01 × 4, 0.02 × 3, 0.03 × 2, 0.04 × 1, each at least the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_mean_ranks_and_their_critical_difference_are_those_of_the_literature():
    """Demšar (2006), section 3.2.2: four classifiers on 14 data sets, q = 2.569, critical difference 1.25."""
    rng = np.random.default_rng(3)
    scores = {name: rng.normal(size=14).tolist() for name in "abcd"}
    found = mean_ranks(scores)
    assert found.critical_difference == pytest.approx(1.25, abs=0.005)
    assert sum(found.ranks.values()) == pytest.approx(10)
    assert found.p == pytest.approx(stats.friedmanchisquare(*scores.values()).pvalue)
    same = mean_ranks({"a": [1.0, 1.0], "b": [1.0, 0.0], "c": [0.0, 0.5]})
    assert same.ranks == {"a": 1.25, "b": 2.25, "c": 2.5}
