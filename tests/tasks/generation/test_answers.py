"""What is read from written answers."""

from __future__ import annotations

import pytest

from evatune.errors import EvaError
from evatune.tasks.generation import answers
from evatune.tasks.generation.answers import JUDGES, check_judges, final_answer, final_number, last_boxed
from evatune.tasks.generation.example import Example

CHOICES = tuple(f"the correct answer is {name}" for name in ("answer1", "answer2", "answer12"))


def judged(judge: str, text: str, **fields):
    verdict = JUDGES[judge](text, Example(pieces=(("", False), ("x", True)), judge=judge, **fields))
    return verdict.given, verdict.right


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("the correct answer is answer2", "answer2"),
        ("The correct answer is Answer2.", "answer2"),
        ("answer12 because it is not answer2", "answer12"),
        ("not answer1, the correct answer is answer2", "answer2"),
        ("the correct answer is answer22", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_choices(text, given):
    assert judged("choice", text, choices=CHOICES, answer=1) == (given, given == "answer2")


def test_choices_without_common_words():
    assert judged("choice", " positive!", choices=(" negative", " positive"), answer=1) == ("positive", True)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = 24\n#### 72", "72"),
        ("#### 1,234.50 dollars", "1234.50"),
        ("so 5 - 3 = 2. The answer is: -2", "-2"),
        ("The answer is $18.", "18"),
        ("first 7, then 8 eggs.", "8"),
        ("she has 12-4=8", "8"),
        ("The answer is unknown", None),
        ("none", None),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == number
    assert judged("number", text, expected="72") == (number, number == "72")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$ and then \boxed{3 + {x}}.", "3 + {x}"),
        (r"\boxed 5 is it", "5"),
        ("... The answer is: $\\frac{3}{4}$.", r"\frac{3}{4}"),
        ("The answer is: .5", ".5"),
        ("The answer is: $.5$.", ".5"),
        (r"\boxed{open", None),
        ("nothing", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer
    assert last_boxed("no box") is None


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"Thus \boxed{0.5}", True),
        ("The answer is: 1/2", True),
        (r"The answer is: $\frac{2}{4}$", True),
        (r"\boxed{\frac{1}{3}}", False),
    ],
)
def test_mathematics_is_compared_by_value(text, right):
    given, is_right = judged("mathematics", text, expected=r"\frac{1}{2}")
    assert given is not None
    assert is_right is right


def test_mathematics_that_cannot_be_read():
    assert judged("mathematics", "I give up", expected="2") == (None, False)
    assert judged("mathematics", r"\boxed{(3, \pi/2)}", expected=r"\left( 3, \frac{\pi}{2} \right)")[1]


def test_a_package_that_is_missing_is_told_before_anything_is_written(monkeypatch):
    example = Example(pieces=(("", False), ("x", True)), judge="mathematics", expected="2")
    check_judges([example], allow_code_execution=False)
    monkeypatch.setattr(answers, "find_spec", lambda name: None)
    with pytest.raises(EvaError, match=r"needs the Python package math-verify; run: pip install 'evatune\[math\]'"):
        check_judges([example], allow_code_execution=False)
