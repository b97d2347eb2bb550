"""Records in short lines: nothing is lost, what runs share is written once, and plain lines are read too."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from evatune.compare.packing import Packer


def record(name: str, seed: int, **changed: Any) -> dict[str, Any]:
    versions = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "numpy": "2.4.6"}
    outcomes = {"right": [1, 0] * 50, "loss": [0.5, 1, None] * 33 + [0.25], "expected": list(range(100))}
    scores = {"headline": "accuracy", "metrics": {"accuracy": 0.5 + seed / 100}, "outcomes": outcomes, "seconds": seed}
    return {
        "name": name,
        "state": "done",
        "recipe": {
            "task": "understanding",
            "model": {"name": "some/model", "dtype": "float32", "revision": None, "trust_remote_code": False},
            "adapter": {"method": "lora", "rank": 8, "layers_to_transform": list(range(12)), "bias": "none"},
            "train": {"seed": seed, "steps": 60, "schedule": "linear", "learning_rate": 1e-3, "weight_decay": 0.0},
        },
        "versions": versions,
        "log": [{"loss": 0.1 * step, "step": step} for step in range(1, 61)],
        "before": scores,
        "after": copy.deepcopy(scores) | {"seconds": seed + 0.5},
    } | changed


def read(text: str) -> list[dict[str, Any]]:
    packer = Packer()
    return [found for line in text.splitlines() if (found := packer.read(line)) is not None]


def same(first: Any, second: Any) -> bool:
    """Whether two values are the same JSON; 1 is not 1.0."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def test_nothing_is_lost_and_what_runs_share_is_written_once():
    records = [record(f"run{seed}", seed) for seed in range(10)]
    packer = Packer()
    text = "".join(packer.lines(one) for one in records)
    assert same(read(text), records)
    assert text.count('"torch"') == text.count('"some/model"') == 1
    plain = "".join(json.dumps(one) + "\n" for one in records)
    assert len(text) < len(plain) / 4
    assert text.splitlines()[-1].startswith('{"name":"run9","state":"done","recipe":{"$like":')


@pytest.mark.parametrize(
    "changed",
    [
        {"recipe": {"task": "understanding"}},  # lacks entries of the shared one
        {"versions": {"python": "3.11.7", "more": {"a": [1]}}},
        {"versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}},  # one less
        {"before": record("x", 0)["before"] | {"seconds": 0.0}},  # 0.0 is not 0
        {"log": [{"loss": 1.0, "step": 1}, {"step": 1, "eval_loss": 2.0}] * 8},  # not all have the same keys
        {"log": []},
        {"after": None, "reason": "ValueError: broken"},
        {"after": {"outcomes": {"right": [1, 0, True] * 5, "expected": [10, 0] * 9, "one": [1.0] * 9}}},
        {"after": {"outcomes": {"negative": list(range(-5, 9)), "none": [None] * 9, "words": ["é"] * 9}}},
        {"before": record("x", 1)["before"] | {"metrics": 3}},  # a number in place of a mapping
    ],
)
def test_records_of_any_form_come_back_as_they_were(changed):
    records = [record("first", 0), record("second", 1, **changed), record("third", 2)]
    packer = Packer()
    assert same(read("".join(packer.lines(one) for one in records)), records)


def test_plain_lines_are_read_and_lines_of_runs_may_be_removed():
    packer = Packer()
    first, second = (packer.lines(record(f"run{seed}", seed)) for seed in range(2))
    plain = json.dumps(record("plain", 5)) + "\n"
    shared = "".join(line + "\n" for line in first.splitlines() if line.startswith('{"shared"'))
    assert same(read(plain + shared + second), [record("plain", 5), record("run1", 1)])
    with pytest.raises(KeyError):
        read(second)
