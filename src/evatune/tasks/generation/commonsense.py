"""The eight commonsense tasks in the prompts of the paper's Table 5 (arXiv:2410.07170, Appendix B).

Each function takes a row of a data set in its original form. Rows that have these prompts already, such as the files of
Hu et al. (2023), are read by `templated` and stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evatune.errors import EvaError
from evatune.tasks.generation.example import Example, prompted, text_of
from evatune.tasks.rows import Row

LINE = "{prompt}\n"
"""Prompt and answer stand on lines of their own."""
_STEM = "the correct answer is "
_ANY = "Please choose the correct answer to the question: "
_MISSING = ("", "-1")
"""Labels of rows whose answer is not published."""


def boolq(row: Row) -> Example | None:
    """Read `passage`, `question` and `answer` (true or false); the passage stands first."""
    question = (
        f"Passage: {text_of(row, 'passage')}\n\nAfter reading this passage, please answer the following question with "
        f"true or false, question: {text_of(row, 'question')}"
    )
    answers = ("true", "false")
    return _question(question, answers, _index(text_of(row, "answer").lower(), answers, field="answer"))


def piqa(row: Row) -> Example | None:
    """Read `goal`, `sol1`, `sol2` and `label` (0 or 1)."""
    goal, solutions = text_of(row, "goal"), [text_of(row, "sol1"), text_of(row, "sol2")]
    question = f"Please choose the correct solution to the question: {goal}\n\n"
    return _choice(question, "solution", solutions, _label(row, "label", ("0", "1")), between="\n\n")


def siqa(row: Row) -> Example | None:
    """Read `context`, `question`, `answerA` to `answerC` and `label` (1 to 3)."""
    question = f"{_ANY}{text_of(row, 'context')} {text_of(row, 'question')}\n\n"
    answers = [text_of(row, field) for field in ("answerA", "answerB", "answerC")]
    return _choice(question, "answer", answers, _label(row, "label", ("1", "2", "3")))


def hellaswag(row: Row) -> Example | None:
    """Read `activity_label`, `ctx_a`, `ctx_b`, `endings` and `label` (0 to 3)."""
    begun = text_of(row, "ctx_b")
    sentence = f"{text_of(row, 'activity_label')}: {text_of(row, 'ctx_a')} {begun[:1].upper()}{begun[1:]}".rstrip()
    question = f"Please choose the correct ending to complete the given sentence: {sentence}\n\n"
    endings = _texts(row.get("endings"), field="endings")
    return _choice(question, "ending", endings, _label(row, "label", [str(number) for number in range(len(endings))]))


def winogrande(row: Row) -> Example | None:
    """Read `sentence`, `option1`, `option2` and `answer` (1 or 2)."""
    question = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{text_of(row, 'sentence')}\n\n"
    )
    options = [text_of(row, "option1"), text_of(row, "option2")]
    return _choice(question, "option", options, _label(row, "answer", ("1", "2")))


def arc(row: Row) -> Example | None:
    """Read `question`, `choices` (`text` and `label`) and `answerKey`."""
    return _keyed(row, text_of(row, "question"))


def openbookqa(row: Row) -> Example | None:
    """Read `question_stem`, `choices` (`text` and `label`) and `answerKey`."""
    return _keyed(row, text_of(row, "question_stem"))


def templated(row: Row) -> Example | None:
    """Read an instruction that ends in `Answer format: a/b/c`, and an output that ends in the answer."""
    instruction, output, answer = text_of(row, "instruction"), text_of(row, "output"), text_of(row, "answer")
    if row.get("input"):
        instruction = f"{instruction}\n{text_of(row, 'input')}"
    example = prompted(LINE, instruction, output)
    listed = re.search(r"Answer format:\s*(\S+)\s*$", instruction)
    if example is None or not answer:
        return None
    if not listed:
        return example
    choices = listed[1].split("/")
    if answer not in choices:
        raise EvaError(f"field 'answer' is {answer!r}, but must be one of {', '.join(choices)}.")
    if not output.endswith(answer):
        raise EvaError(f"field 'output' is {output!r}, but must end in the answer, {answer!r}.")
    return _with_choices(example, output.removesuffix(answer), choices, choices.index(answer))


def _keyed(row: Row, question: str) -> Example | None:
    """Return a question whose choices have keys, such as A to D; tables hold two lists, or a list of pairs."""
    choices: Any = row.get("choices")
    if isinstance(choices, list | tuple) and all(isinstance(choice, Mapping) for choice in choices):
        choices = {field: [choice.get(field) for choice in choices] for field in ("text", "label")}
    if not isinstance(choices, Mapping) or not {"text", "label"} <= set(choices):
        raise EvaError("field 'choices' must hold the lists 'text' and 'label'.")
    texts, keys = _texts(choices["text"], field="choices"), _texts(choices["label"], field="choices")
    return _choice(f"{_ANY}{question}\n\n", "answer", texts, _label(row, "answerKey", keys))


def _choice(
    question: str, name: str, texts: Sequence[str], answer: int | None, *, between: str = " "
) -> Example | None:
    """Return a question with numbered answers."""
    listed = between.join(f"{name.capitalize()}{number}: {text}" for number, text in enumerate(texts, start=1))
    return _question(question + listed, [f"{name}{number}" for number in range(1, len(texts) + 1)], answer)


def _question(question: str, answers: Sequence[str], answer: int | None) -> Example | None:
    if answer is None:
        return None
    example = prompted(LINE, f"{question}\n\nAnswer format: {'/'.join(answers)}", _STEM + answers[answer])
    return example and _with_choices(example, _STEM, answers, answer)


def _with_choices(example: Example, stem: str, choices: Sequence[str], answer: int) -> Example:
    completions = tuple(stem + choice for choice in choices)
    return replace(example, choices=completions, answer=answer, expected=choices[answer], judge="choice")


def _label(row: Row, field: str, labels: Sequence[str]) -> int | None:
    return _index(text_of(row, field), labels, field=field)


def _index(label: str, labels: Sequence[str], *, field: str) -> int | None:
    """Return which of the labels it is, or None for a row whose answer is not published."""
    if label in _MISSING:
        return None
    if label not in labels:
        raise EvaError(f"field {field!r} is {label!r}, but must be one of {', '.join(labels)}.")
    return labels.index(label)


def _texts(values: Any, *, field: str) -> list[str]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise EvaError(f"field {field!r} must hold a list of answers.")
    return [str(value) for value in values]
