"""What a written answer says, and whether that is right.

Every way of judging is a function of the text and the example; the example names it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from evatune.errors import EvaError
from evatune.tasks.generation.example import Example

_NUMBER = re.compile(r"(?:(?<![\d.])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_SECONDS = 5
"""Longest time for reading an answer, and for comparing it."""
_MARKS = ("####", "The answer is:", "the answer is:", "The answer is", "the answer is")
"""What stands before a final answer: in GSM8K, in MetaMathQA, in free text."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one written answer is worth."""

    given: str | None
    """The answer that it gives; None if none can be read."""
    right: bool
    """Whether it is right."""
    reason: str = ""
    """Why a program failed."""


def judge_choice(text: str, example: Example) -> Verdict:
    """Read the first choice that a text names: the choices without the words that they all begin with."""
    stem, names = _common_beginning(example.choices), names_of_choices(example.choices)
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(re.escape(name) for name in longest_first)
    after = text.split(stem.strip(), 1)[-1] if stem.strip() else text
    found = re.search(rf"(?<!\w)({pattern})(?!\w)", after, flags=re.IGNORECASE)
    given = next((name for name in names if found and name.lower() == found[1].lower()), None)
    return Verdict(given=given, right=given is not None and given == names[example.answer or 0])


def judge_number(text: str, example: Example) -> Verdict:
    """Read the final number: the first after the last mark of an answer, else the last of the text."""
    given = final_number(text)
    if given is None:
        return Verdict(given=None, right=False)
    return Verdict(given=given, right=abs(float(given) - float(example.expected)) < 1e-6)


def judge_mathematics(text: str, example: Example) -> Verdict:
    """Compare the final answer with the expected one as mathematics: 1/2, 0.5 and 50% are equal."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    kinds = (LatexExtractionConfig(), ExprExtractionConfig())
    # Its limits on time are alarms, which only the main thread can set.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    answer = final_answer(text)
    given = parse(f"${answer}$" if answer else text, kinds, parsing_timeout=seconds)
    if not given:
        return Verdict(given=None, right=False)
    expected = parse(f"${example.expected}$", kinds, parsing_timeout=seconds)
    return Verdict(given=answer or str(given[-1]), right=bool(verify(expected, given, timeout_seconds=seconds)))


JUDGES: dict[str, Callable[[str, Example], Verdict]] = {
    "choice": judge_choice,
    "number": judge_number,
    "mathematics": judge_mathematics,
}
"""Ways of judging by name; programs are judged by `evatune.tasks.generation.programming`, which runs them."""


def check_judges(examples: Sequence[Example], *, allow_code_execution: bool) -> None:
    """Check that the written answers to some examples can be judged here.

    Args:
        examples: what will be answered.
        allow_code_execution: whether programs of the model may be run.

    Raises:
        EvaError: no example says what is right, programs may not be run, or a package is missing.
    """
    if not any(example.judge for example in examples):
        raise EvaError(
            "none of the held-out examples says what a right answer is, so no written answer can be judged; set "
            "data.scoring to likelihood."
        )
    if any(example.program for example in examples) and not allow_code_execution:
        raise EvaError(
            "the held-out examples are programming problems, whose score needs programs of the model to be run on this "
            "machine; allow it with --allow-code-execution, or set data.scoring to likelihood."
        )
    if any(example.judge == "mathematics" for example in examples) and find_spec("math_verify") is None:
        raise EvaError(
            "comparing mathematical answers needs the Python package math-verify; run: pip install 'evatune[math]'."
        )


def final_number(text: str) -> str | None:
    """Return the final number of a worked answer, without thousands separators; None if there is none."""
    marked = _after_mark(text)
    numbers = [number.replace(",", "") for number in _NUMBER.findall(text if marked is None else marked)]
    if not numbers:
        return None
    return numbers[-1] if marked is None else numbers[0]


def final_answer(text: str) -> str | None:
    """Return the final answer of a worked solution: what is boxed last, else what stands after a mark."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    marked = _after_mark(text)
    lines = (marked or "").strip().splitlines()
    return (lines[0].strip(" $").rstrip(" .$") or None) if lines else None


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{...}`, braces balanced; None if there is none."""
    begin = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if begin < 0:
        found = re.findall(r"\\boxed\s+([^\s$]+)", text)
        return found[-1] if found else None
    start = text.index("{", begin) + 1
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return None


def _after_mark(text: str) -> str | None:
    places = [(text.rfind(mark), mark) for mark in _MARKS]
    place, mark = max(places)
    return text[place + len(mark) :] if place >= 0 else None


def names_of_choices(choices: tuple[str, ...]) -> list[str]:
    """Return choices without the words that they all begin with."""
    return [choice[len(_common_beginning(choices)) :] for choice in choices]


def _common_beginning(choices: tuple[str, ...]) -> str:
    """Return the words that all choices begin with."""
    alike = 0
    for letters in zip(*choices, strict=False):
        if len(set(letters)) > 1:
            break
        alike += 1
    return choices[0][: choices[0].rfind(" ", 0, alike) + 1]
