"""Worked mathematics: what is learned, and which final answer is expected."""

from __future__ import annotations

import pytest

from evatune.tasks.generation.formats import find_format

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n1 + 1?\n\n### Response: Let's think step by step.\n"
)


@pytest.mark.parametrize(
    ("row", "completion", "expected", "judge"),
    [
        ({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 1,002"}, "1 + 1 = 2\n#### 1,002", "1002", "number"),
        ({"query": "1 + 1?", "response": "So. The answer is: 2"}, "So. The answer is: 2", "2", "mathematics"),
        ({"problem": "1 + 1?", "solution": r"It is $\boxed{2}$."}, r"It is $\boxed{2}$.", "2", "mathematics"),
        ({"problem": "1 + 1?", "solution": "It is 2.", "answer": "2"}, "It is 2.", "2", "mathematics"),
        ({"query": "1 + 1?", "response": "two"}, "two", "", ""),
    ],
)
def test_worked_examples(row, completion, expected, judge):
    example = find_format("auto", row, source="data")(row)
    assert example.prompt == PROMPT
    assert example.completion == completion
    assert (example.expected, example.judge, example.question) == (expected, judge, "1 + 1?")


def test_every_solution_of_gsm8k_has_a_number(real_data):
    from evatune.tasks.generation.examples import load_examples

    assert all(example.expected for example in load_examples(real_data("gsm8k/test.jsonl")))
