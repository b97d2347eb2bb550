"""What the task definitions beside this file call: rows of a data set become questions with the paper's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evatune.tasks.generation.answers import JUDGES
from evatune.tasks.generation.example import Example
from evatune.tasks.generation.formats import find_format


def questions(rows: Any) -> Any:
    """Return a data set of multiple-choice questions: `prompt`, `choices` and the index of the right one, `answer`."""
    return _documents(
        [
            {"prompt": example.prompt, "choices": list(example.choices), "answer": example.answer}
            for example in _examples(rows)
            if example.answer is not None
        ]
    )


def problems(rows: Any) -> Any:
    """Return a data set of problems: `prompt`, a worked `solution`, the answer that is `expected`, and its `judge`."""
    return _documents(
        [
            {
                "prompt": example.prompt,
                "solution": example.completion,
                "expected": example.expected,
                "judge": example.judge,
            }
            for example in _examples(rows)
        ]
    )


def judged(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether a written answer to a problem is right."""
    pieces = ((document["prompt"], False), (document["solution"], True))
    verdict = JUDGES[document["judge"]](results[0], Example(pieces=pieces, expected=document["expected"]))
    return {"acc": float(verdict.right)}


def _examples(rows: Any) -> list[Example]:
    converts = find_format("auto", rows[0], source="the data set")
    return [example for row in rows if (example := converts(row)) is not None]


def _documents(content: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(content)
