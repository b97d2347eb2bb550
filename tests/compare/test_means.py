"""Means of test scores over tasks and groups of tasks."""

from __future__ import annotations

import math

import pytest

from evatune.compare.board import Board
from evatune.compare.loop import compare
from evatune.compare.standing import Standing, standings


def standing(task: str, score: float | None, *, method: str = "lora", metric: str = "accuracy", **options) -> Standing:
    scores = {} if score is None else {0: score - 0.5, 1: score + 0.5}
    values = {"task": task, "model": "", "method": method, "point": {}, "open": [], "n_seeds": 2, "trainable": 1}
    return Standing(**values | {"scores": scores, "metric": metric} | options)


def test_means_are_over_groups_over_the_groups_and_over_all_tasks():
    # LoRA in the paper's Table 26: the 7, 4 and 8 tasks of VTAB-1K have these means, and All is that of the 19 tasks.
    published = {"natural": (7, 83.2), "specialized": (4, 88.8), "structured": (8, 69.0)}
    rows = [
        standing(f"{group}-{number}", mean + number - (count - 1) / 2, group=group)
        for group, (count, mean) in published.items()
        for number in range(count)
    ]
    means = {name: by_method["lora"] for name, by_method in Board(rows=rows).means.items()}
    assert list(means) == ["natural (mean)", "specialized (mean)", "structured (mean)", "mean of groups", "mean"]
    assert [means[f"{group} (mean)"] for group in published] == pytest.approx([83.2, 88.8, 69.0])
    assert means["mean of groups"] == pytest.approx((83.2 + 88.8 + 69.0) / 3)
    assert means["mean"] == pytest.approx(78.4, abs=0.05)


def test_a_method_has_the_means_whose_tasks_it_has_all():
    rows = [
        standing("a", 1.0, group="first"),
        standing("b", None, group="second"),
        *(standing(task, 2.0, method="eva", group=group) for task, group in (("a", "first"), ("b", "second"))),
    ]
    board = Board(rows=rows)
    assert board.means["first (mean)"] == {"lora": 1.0, "eva": 2.0}
    for name in ("second (mean)", "mean of groups", "mean"):
        assert board.means[name] == {"eva": 2.0}
    assert [line.split() for line in board.means_text().splitlines()[2:]] == [
        ["lora", "1.0000", "–", "–", "–"],
        ["eva", *["2.0000"] * 4],
    ]


def test_groups_of_several_models_are_apart():
    rows = [standing(task, 1.0, model=model, group="all") for model in ("x", "y") for task in "ab"]
    assert Board(rows=rows).groups == {"all x": ["a x", "b x"], "all y": ["a y", "b y"]}


def test_other_metrics_are_scaled_before_means_are_taken():
    rows = [standing("a", 0.5), standing("b", 4.0, metric="loss")]
    rows += [standing("a", 1.0, method="eva"), standing("b", 2.0, method="eva", metric="loss")]
    before = {"metrics": {"accuracy": 0.0, "loss": 6.0}}
    for row in rows:
        row.records.append({"before": before})
    assert Board(rows=rows).means == {"mean": {"lora": pytest.approx(0.5), "eva": pytest.approx(1.0)}}


def test_means_of_losses_are_shown_as_losses():
    rows = [standing(task, 3.0, metric="loss") for task in "ab"]
    assert Board(rows=rows).means == {"mean": {"lora": -3.0}}  # higher is better
    assert Board(rows=rows).shown_means == {"mean": {"lora": 3.0}}
    assert Board(rows=rows).means_text().endswith("lora    3.0000")


def test_one_task_without_a_group_has_no_means():
    board = Board(rows=[standing("a", 1.0)])
    assert board.means == {} and board.means_text() == ""


def test_groups_of_a_sweep_reach_the_results(sweep, fake_engine):
    recipes = {"a": {"recipe": "task.yaml", "group": "first"}, "b": "task.yaml"}
    results = compare(sweep(recipes=recipes), fake_engine(lambda run: math.log10(run.point["train.learning_rate"])))
    assert results.groups == {"a": "first"}
    assert {row.task: row.group for row in standings(results).rows} == {"a": "first", "b": ""}
