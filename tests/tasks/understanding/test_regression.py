"""Regression: numbers as labels, and their correlation with what the head says."""

from __future__ import annotations

import random

import pytest
from scipy import stats
from tests.on_device import TRAINED_BY_TRAINER

from evatune.errors import EvaError
from evatune.tasks.understanding.regression import Regression
from evatune.tasks.understanding.settings import UnderstandingData
from evatune.training import finetune

PLAIN = Regression(data=UnderstandingData())


@pytest.fixture
def alike(write_rows):
    """Pairs whose label is how often the word good stands in the first."""
    chance = random.Random(0)
    rows = []
    for _ in range(96):
        number = chance.randint(0, 4)
        rows.append({"sentence1": " ".join(["good"] * number + ["red"] * 2), "sentence2": "blue", "label": number})
    return write_rows("train.jsonl", *rows), write_rows("test.jsonl", *rows[:40])


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_a_run_learns_numbers(recipe, alike):
    train, test = alike
    sections = {"data": {"kind": "regression", "train": [train], "eval": [test]}, "train": {"steps": 40}}
    record = finetune(recipe(**sections), progress=False)
    assert record.after["headline"] == "pearson"
    assert record.after["metrics"]["pearson"] > 0.8
    assert record.after["metrics"]["loss"] < record.before["metrics"]["loss"]
    low, high = record.after["intervals"]["spearman"]
    assert low < record.after["metrics"]["spearman"] < high
    assert (record.data["lowest_label"], record.data["highest_label"]) == (0, 4)


def test_scores_are_those_of_scipy(opened, alike):
    train, test = alike
    task = opened(kind="regression", train=(train,), eval=(test,))
    scores = task.evaluate(task.load_model(), progress=False)
    expected, predicted = scores.outcomes["expected"], scores.outcomes["predicted"]
    assert scores["pearson"] == pytest.approx(stats.pearsonr(expected, predicted).statistic)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(expected, predicted).statistic)
    assert [(told["expected"], told["given"]) for told in scores.examples] == list(
        zip(expected, predicted, strict=True)
    )
    assert scores.examples[0]["question"].endswith(" ⏐ blue")
    assert "→ ⟦" in task.preview(1).text


def test_labels_are_numbers_in_the_range_or_hidden():
    row = {"text": "a", "score": 2}
    assert PLAIN.converter(row, "x")(row).label == "2"
    assert PLAIN.converter(row, "x")({"text": "a", "score": -1}).label == "-1"
    stsb = Regression(data=UnderstandingData(glue="stsb"))
    pair = {"sentence1": "a", "sentence2": "b", "label": 5.0}
    convert = stsb.converter(pair, "x")
    assert convert(pair).texts == ("a", "b")
    assert convert(pair | {"label": -1.0}) is None  # the test split on the hub
    assert convert(pair | {"label": ""}) is None
    with pytest.raises(EvaError, match=r"label 5\.5 is out of range: it must be from 0 to 5 \(label_range\)"):
        convert(pair | {"label": 5.5})
    with pytest.raises(EvaError, match="label 'high' is not a number"):
        convert(pair | {"label": "high"})
    with pytest.raises(EvaError, match="label 'nan' is not a number"):
        convert(pair | {"label": float("nan")})
    with pytest.raises(EvaError, match=r"data\.label_range is \(5\.0, 0\.0\), but must be two numbers"):
        UnderstandingData(label_range="5,0")


def test_equal_labels_cannot_be_learned(opened, write_rows):
    path = write_rows("train.jsonl", {"text": "a", "score": 1}, {"text": "b", "score": 1.0})
    with pytest.raises(EvaError, match=r"all training texts have the label 1(.0)?; a regression needs two at least"):
        _ = opened(kind="regression", train=(path,)).train
