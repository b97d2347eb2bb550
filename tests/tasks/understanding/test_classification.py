"""Classification: the names of the classes, of the columns, and what a row may hold."""

from __future__ import annotations

import pytest
from sklearn import metrics

from evatune.errors import EvaError
from evatune.tasks.understanding.classification import Classification
from evatune.tasks.understanding.settings import UnderstandingData
from evatune.tasks.understanding.texts import Labelled

PLAIN = Classification(data=UnderstandingData())


def test_classes_are_in_the_order_of_numbers_or_of_the_alphabet():
    assert PLAIN.labels([Labelled(texts=("a",), label=label) for label in ("10", "2", "-3", "2")]) == ("-3", "2", "10")
    assert PLAIN.labels([Labelled(texts=("a",), label=label) for label in ("no", "maybe")]) == ("maybe", "no")
    with pytest.raises(EvaError, match="all training texts are of class 'x'; a classifier needs two at least"):
        PLAIN.labels([Labelled(texts=("a",), label="x")])


def test_columns_are_found_by_their_usual_names():
    pair = PLAIN.converter({"sentence1": "a", "sentence2": "b", "label": 1}, "x")
    assert pair({"sentence1": "a", "sentence2": "b", "label": 1}) == Labelled(texts=("a", "b"), label="1")
    assert pair({"sentence1": "a", "sentence2": "b", "label": -1}) is None  # hidden
    assert pair({"sentence1": "a", "sentence2": "b", "label": " "}) is None
    with pytest.raises(EvaError, match="column 'sentence2' holds 3, which is not a string"):
        pair({"sentence1": "a", "sentence2": 3, "label": 1})
    with pytest.raises(
        EvaError, match=r"no column of labels that is known \(label, .*it has text, gold: .*\(label=NAME\)"
    ):
        PLAIN.converter({"text": "a", "gold": 1}, "x")


def test_a_class_that_training_never_saw_is_named(texts, opened, write_rows):
    test = write_rows("test.jsonl", {"text": "red", "label": "goood"})
    task = opened(train=(str(texts / "train.jsonl"),), eval=(test,))
    with pytest.raises(EvaError, match=r"label 'goood' is no class of the training data \(did you mean 'good'"):
        _ = task.held_out


def test_scores_are_those_of_scikit_learn(opened, write_rows):
    rows = [{"text": f"{'red' if n % 3 else 'blue'} {n}", "label": "abc"[n % 3]} for n in range(12)]
    path = write_rows("rows.jsonl", *rows)
    task = opened(train=(path,), eval=(path,))
    scores = task.evaluate(task.load_model(), progress=False)
    expected, predicted = scores.outcomes["expected"], scores.outcomes["predicted"]
    assert list(scores.metrics) == ["accuracy", "matthews", "loss", "macro_f1"]
    assert scores["accuracy"] == metrics.accuracy_score(expected, predicted)
    assert scores["matthews"] == pytest.approx(metrics.matthews_corrcoef(expected, predicted))
    assert scores["macro_f1"] == pytest.approx(metrics.f1_score(expected, predicted, average="macro"))
    assert scores["loss"] > 0
    for told, one, other in zip(scores.examples, expected, predicted, strict=True):
        assert (told["expected"], told["given"]) == ("abc"[int(one)], "abc"[int(other)])
        assert told["right"] == (one == other)
        assert "set" not in told


def test_the_headline_is_what_was_asked_for(opened, texts):
    data = {"train": (str(texts / "train.jsonl"),), "eval": (str(texts / "test.jsonl"),)}
    task = opened(**data, headline="f1")
    model = task.load_model()
    assert next(iter(task.evaluate(model, limit=8, progress=False).numbers())) == "f1"
    task = opened(**data, headline="matthew")
    with pytest.raises(EvaError, match=r"data\.headline is 'matthew', but must be .*\(did you mean 'matthews'"):
        task.evaluate(model, limit=8, progress=False)


def test_a_class_that_is_stated_is_not_a_hidden_label(opened, write_rows):
    path = write_rows("rows.jsonl", *({"text": f"red {n}", "label": n} for n in (-1, 0, 1)))
    assert len(opened(train=(path,), classes=("-1", "0", "1")).examples) == 3
    assert opened(train=(path,)).examples.dropped == 1


@pytest.mark.parametrize("is_seen", [True, False])
def test_an_unknown_headline_is_told_before_a_run(opened, texts, is_seen):
    task = opened(train=(str(texts / "train.jsonl"),), headline="acuracy" if is_seen else "macro_f1")
    for early in (task.facts, task.outline):
        with pytest.raises(EvaError, match=r"data.headline is .*, but must be one of accuracy, matthews, loss, f1"):
            early()
