from __future__ import annotations

from evatune.compare.board import Board, paired_outcomes
from evatune.compare.standing import Standing


def row(method: str, *, before: float | None, outcomes: list[float | None]) -> Standing:
    record = {
        "seed": 0,
        "state": "done",
        "before": {"metrics": {"accuracy": before}},
        "after": {"metrics": {"accuracy": 0.5}, "outcomes": {"loss": outcomes, "right": [1.0, 0.0]}},
    }
    return Standing(
        task="a",
        model="",
        method=method,
        point={},
        open=[],
        scores={0: 0.5},
        n_seeds=1,
        metric="accuracy",
        trainable=1,
        records=[record],
    )


def test_numbers_that_are_not_finite_are_passed_over():
    """They are null in a record."""
    rows = [row("lora", before=None, outcomes=[None, 1.0]), row("eva", before=0.25, outcomes=[0.1, None])]
    assert Board(rows=rows).untuned("a") == 0.25
    assert Board(rows=rows[:1]).untuned("a") is None
    assert [pair.tolist() for pair in paired_outcomes(*rows)] == [[0.0, 0.0]]
