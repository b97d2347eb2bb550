"""What the task definitions beside this file call: rows of a data set become questions with the paper's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evatune.tasks.generation.answers import JUDGES, check_judges
from evatune.tasks.generation.example import Example, Program
from evatune.tasks.generation.formats import find_format
from evatune.tasks.generation.programming import judge_programs


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
    """Return a data set of problems: `prompt`, a worked `solution`, the answer that is `expected`, how it is judged.

    Raises:
        EvaError: a package that judges is missing.
    """
    examples = [example for example in _examples(rows) if example.judge]
    check_judges(examples, allow_code_execution=True)  # asked for by `unsafe_code` of the definition
    return _documents(
        [
            {
                "prompt": example.prompt,
                "solution": example.completion,
                "expected": example.expected,
                "judge": example.judge,
                "program": example.program and asdict(example.program),
            }
            for example in examples
        ]
    )


def judged(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether a written answer to a problem is right; a program is run, under limits."""
    program = document["program"]
    example = Example(
        pieces=((document["prompt"], False), (document["solution"], True)),
        expected=document["expected"],
        program=program and Program(**program),
    )
    if program:
        (verdict,) = judge_programs([(results[0], example)])
        return {"pass@1": float(verdict.right)}
    return {"acc": float(JUDGES[document["judge"]](results[0], example).right)}


def _examples(rows: Any) -> list[Example]:
    converts = find_format("auto", rows[0], source="the data set")
    return [example for row in rows if (example := converts(row)) is not None]


def _documents(content: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(content)
