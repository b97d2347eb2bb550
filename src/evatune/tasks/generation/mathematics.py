"""Worked mathematics: GSM8K, MetaMathQA and MATH, in the prompt of Table 5 (arXiv:2410.07170, Appendix B)."""

from __future__ import annotations

from dataclasses import replace

from evatune.tasks.generation.answers import final_answer, final_number, last_boxed
from evatune.tasks.generation.example import Example, prompted, text_of
from evatune.tasks.rows import Row

STEPS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response: Let's think step by step.\n"
)


def gsm8k(row: Row) -> Example | None:
    """Read `question` and `answer`, whose final number stands after `####`."""
    answer = text_of(row, "answer")
    return _worked(text_of(row, "question"), answer, expected=final_number(answer), judge="number")


def metamath(row: Row) -> Example | None:
    """Read `query` and `response`, whose final answer stands after `The answer is:`."""
    response = text_of(row, "response")
    return _worked(text_of(row, "query"), response, expected=final_answer(response), judge="mathematics")


def math(row: Row) -> Example | None:
    r"""Read `problem` and `solution`, whose final answer is `\boxed{...}`, else the field `answer`."""
    solution = text_of(row, "solution")
    expected = last_boxed(solution) or text_of(row, "answer")
    return _worked(text_of(row, "problem"), solution, expected=expected, judge="mathematics")


def _worked(question: str, solution: str, *, expected: str | None, judge: str) -> Example | None:
    example = prompted(STEPS, question, solution)
    return replace(example, expected=expected, judge=judge) if example and expected else example
