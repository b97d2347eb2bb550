"""The example of programming problems: its files, and what its stand-in scores."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples" / "programming.py"


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location("evatune_programming", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problem(number: int) -> dict:
    return {
        "task_id": number,
        "text": f"Write a function that adds {number}.",
        "code": f"def add(value):\n    return value + {number}",
        "test_list": [f"assert add(1) == {number + 1}"],
    }


def test_files_and_scores(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "packaged", lambda name: [problem(number) for number in range(404)])
    module.write_problems(tmp_path)
    learned, held_out = ((tmp_path / "mbpp" / f"{split}.jsonl").read_text() for split in ("train", "test"))
    assert [json.loads(line)["task_id"] for line in held_out.splitlines()] == [400, 401, 402, 403]
    assert len(learned.splitlines()) == 400
    examples = list(module.load_examples(["mbpp"], folder=str(tmp_path), held_out=True))
    assert module.score_stand_in(examples)["pass@1"] == 0.5
