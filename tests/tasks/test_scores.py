"""Metrics from the outcomes of single examples, and their intervals against textbook formulas."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from evatune.errors import EvaError
from evatune.tasks.scores import Metric, Scores, is_better_higher, score_line, score_rows


def scores(**outcomes: list[float]) -> Scores:
    metrics = {
        "loss": Metric(columns=("nll", "tokens"), statistic="ratio"),
        "accuracy": Metric(columns=("right",), form=".1%"),
    }
    return Scores(
        headline="accuracy",
        metrics={name: metric for name, metric in metrics.items() if set(metric.columns) <= set(outcomes)},
        outcomes=outcomes,
        counts={"examples": len(next(iter(outcomes.values())))},
        seconds=1.0,
    )


def test_values_are_those_of_all_examples():
    result = scores(nll=[2.0, 6.0], tokens=[1.0, 3.0], right=[1, 0])
    assert (result["loss"], result["accuracy"]) == (2.0, 0.5)  # loss: a mean over tokens, not over examples
    assert list(result.numbers()) == ["accuracy", "loss"]  # the headline comes first
    with pytest.raises(EvaError, match=r"no metric 'acuracy' here \(did you mean 'accuracy'"):
        result["acuracy"]


@pytest.mark.parametrize("seed", [0, 1])
def test_interval_of_a_share_is_that_of_the_normal_approximation(seed):
    chance = np.random.default_rng(seed)
    right = (chance.random(800) < 0.7).astype(float).tolist()
    result = scores(right=right)
    low, high = result.interval("accuracy", seed=seed)
    share = result["accuracy"]
    half = 1.96 * (share * (1 - share) / len(right)) ** 0.5
    assert (share - low, high - share) == (pytest.approx(half, rel=0.12), pytest.approx(half, rel=0.12))
    wider = result.interval("accuracy", confidence=0.99)
    assert wider[0] < low and wider[1] > high
    assert result.interval("accuracy", seed=seed) == (low, high)


def test_outcomes_that_are_all_alike_leave_room_for_doubt():
    z2, n = 1.959964**2, 20
    low, high = scores(right=[1.0] * n).interval("accuracy")
    assert (low, high) == (pytest.approx(n / (n + z2), rel=1e-4), 1.0)
    low, high = scores(right=[0.0] * n).interval("accuracy")
    assert (low, high) == (0.0, pytest.approx(z2 / (n + z2), rel=1e-4))


def test_standard_error_of_a_share_is_the_textbook_s():
    right = [1.0] * 240 + [0.0] * 160
    result = scores(right=right)
    assert result.standard_error("accuracy") == pytest.approx((0.6 * 0.4 / 400) ** 0.5, rel=0.05)
    assert result.to_json()["standard_errors"]["accuracy"] == result.standard_error("accuracy")
    assert scores(right=[1]).to_json()["standard_errors"] == {}


def test_interval_of_a_ratio_resamples_examples_and_not_tokens():
    # One long example holds all of the loss: an interval over tokens would be narrow, one over examples is not.
    low, high = scores(nll=[0.0] * 9 + [90.0], tokens=[1.0] * 9 + [81.0]).interval("loss")
    assert low == 0.0
    assert high > 1.0


def test_one_example_has_no_interval():
    result = scores(right=[1])
    assert result.interval("accuracy") is None
    assert result.to_json()["intervals"] == {}
    assert score_line(result.to_json()) == "accuracy 100.0%"


def test_json_is_plain_and_shown_without_the_outcomes():
    content = json.loads(json.dumps(scores(right=[1, 0, 1, 1]).to_json()))
    assert content["metrics"] == {"accuracy": 0.75}
    assert content["counts"] == {"examples": 4}
    low, high = content["intervals"]["accuracy"]
    assert score_rows(content) == [["accuracy", "75.0%", f"{low:.1%} to {high:.1%}"]]
    assert score_line(content) == f"accuracy 75.0% ({low:.1%} to {high:.1%})"


def test_values_are_resampled_once(monkeypatch):
    calls = []
    real = stats.bootstrap
    monkeypatch.setattr(stats, "bootstrap", lambda *args, **options: calls.append(1) or real(*args, **options))
    assert scores(right=[1, 0, 1, 1]).to_json()["standard_errors"]["accuracy"] > 0
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("metric", "better_higher"),
    [
        ("accuracy", True),
        ("loss", False),
        ("loss/boolq", False),
        ("perplexity (test.tsv)", False),
        ("accuracy/glossary.jsonl", True),
        ("accuracy (error_reports.tsv)", True),
    ],
)
def test_which_way_is_better_depends_on_what_is_measured_and_not_on_where(metric, better_higher):
    assert is_better_higher(metric) is better_higher
