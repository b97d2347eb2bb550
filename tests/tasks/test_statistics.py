"""Statistics for many resamples at once, against SciPy and scikit-learn for one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from evatune.tasks.scores import Metric, Scores
from evatune.tasks.statistics import STATISTICS

ORACLES = {
    "pearson": lambda expected, given: stats.pearsonr(expected, given).statistic,
    "spearman": lambda expected, given: stats.spearmanr(expected, given).statistic,
    "matthews": metrics.matthews_corrcoef,
    "f1": metrics.f1_score,
    "macro_f1": lambda expected, given: metrics.f1_score(expected, given, average="macro"),
}


@pytest.mark.parametrize(
    ("name", "classes"), [(name, classes) for name in ORACLES for classes in (2, 4) if (name, classes) != ("f1", 4)]
)
def test_every_resample_has_the_value_of_an_oracle(name, classes):
    chance = np.random.default_rng(classes)
    expected = chance.integers(classes, size=(2, 5, 40)).astype(float)
    given = np.where(chance.random(expected.shape) < 0.6, expected, chance.integers(classes, size=expected.shape))
    found = STATISTICS[name](expected, given, axis=-1)
    assert found.shape == (2, 5)
    for index in np.ndindex(2, 5):
        assert found[index] == pytest.approx(ORACLES[name](expected[index], given[index]), abs=1e-12)


@pytest.mark.parametrize("name", ORACLES)
def test_a_constant_prediction_has_no_correlation_and_breaks_nothing(name):
    expected, given = np.array([0.0, 0, 1, 0]), np.zeros(4)
    assert STATISTICS[name](expected, given) == pytest.approx({"macro_f1": 3 / 7}.get(name, 0.0))


def test_large_offsets_leave_correlations_exact():
    chance = np.random.default_rng(0)
    expected = chance.normal(size=200)
    given = expected + chance.normal(size=200)
    shifted = STATISTICS["pearson"](expected + 1e6, given * 1e-6)
    assert shifted == pytest.approx(stats.pearsonr(expected, given).statistic, rel=1e-8)


def test_the_interval_of_a_correlation_is_that_of_fisher():
    chance = np.random.default_rng(0)
    expected = chance.normal(size=400)
    given = 0.8 * expected + 0.6 * chance.normal(size=400)
    scores = Scores(
        headline="pearson",
        metrics={"pearson": Metric(columns=("expected", "given"), statistic="pearson")},
        outcomes={"expected": expected.tolist(), "given": given.tolist()},
        counts={},
        seconds=0.0,
    )
    oracle = stats.pearsonr(expected, given).confidence_interval(0.95)
    assert scores.interval("pearson") == pytest.approx((oracle.low, oracle.high), abs=0.01)


def test_the_mean_of_groups_weighs_each_group_alike():
    values, groups = np.array([1.0, 0, 0, 0, 1]), np.array([0.0, 0, 0, 0, 1])
    assert STATISTICS["mean_of_groups"](values, groups) == pytest.approx((0.25 + 1) / 2)
    resamples = np.array([[1.0, 0], [0, 1]]), np.array([[0.0, 1], [1, 1]])  # the second has nothing of group 0
    assert STATISTICS["mean_of_groups"](*resamples, axis=-1) == pytest.approx([0.5, 0.5])
