"""Programming problems: HumanEval, MBPP, and their + versions, judged by running programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from evatune.errors import EvaError
from evatune.tasks.generation.answers import Verdict
from evatune.tasks.generation.example import PLAIN, Example, Program, text_of
from evatune.tasks.generation.sandbox import run_programs
from evatune.tasks.rows import Row

_BODY_ENDS = ("\ndef ", "\nclass ", "\nif ", "\nprint(", "\n#", "\n@", "\n```")
"""What follows the body of a function that a model continues."""
_PROGRAM_ENDS = ("\nassert", "\nprint(", "\nif ", '\n"""', "\n#", "\n```")
_ASK_FUNCTION = (
    "Complete this Python function. Answer with the whole function in a code block.\n\n```python\n{prompt}\n```"
)
_ASK_PROGRAM = "{prompt}\n\nAnswer with Python code in a code block. It must pass:\n\n```python\n{tests}\n```"
_EVALPLUS = """
import copy, math

def _equal(given, expected, tolerance):
    if isinstance(expected, float) or isinstance(given, float):
        return given == expected or (
            isinstance(given, (int, float)) and math.isclose(given, expected, rel_tol=1e-7, abs_tol=tolerance or 1e-9)
        )
    if isinstance(expected, (list, tuple)) and isinstance(given, (list, tuple)):
        return len(given) == len(expected) and all(_equal(a, b, tolerance) for a, b in zip(given, expected))
    return given == expected

_reference = {{"__name__": "reference"}}
exec({reference!r}, _reference)
for _input in {inputs!r}:
    try:
        _expected = _reference[{name!r}](*copy.deepcopy(_input))
    except Exception:
        continue
    assert _equal({name}(*copy.deepcopy(_input)), _expected, {tolerance!r}), "wrong answer"
"""
"""Tests that compare with a reference solution; inputs that the reference cannot take are left out."""


def humaneval(row: Row) -> Example | None:
    """Read `prompt`, `entry_point`, `test` and `canonical_solution`."""
    name = text_of(row, "entry_point")
    return _function(row, tests=f"{text_of(row, 'test')}\ncheck({name})")


def evalplus(row: Row) -> Example | None:
    """Read `prompt`, `entry_point`, `canonical_solution`, `base_input`, `plus_input` and `atol` of an evalplus file."""
    inputs = [*_listed(row, "base_input"), *_listed(row, "plus_input")]
    reference = text_of(row, "prompt") + text_of(row, "canonical_solution")
    tests = _EVALPLUS.format(
        reference=reference, inputs=inputs, name=text_of(row, "entry_point"), tolerance=row.get("atol") or 0
    )
    return _function(row, tests=tests)


def mbpp(row: Row) -> Example | None:
    """Read `text` or `prompt`, `code`, and `test` or `test_list` with `test_setup_code` or `test_imports`."""
    shown, task = _listed(row, "test_list"), text_of(row, "text") or text_of(row, "prompt")
    setup = [text_of(row, "test_setup_code"), *(_listed(row, "test_imports") if row.get("test_imports") else [])]
    tests = text_of(row, "test") or "\n".join(map(str, shown))
    solution = text_of(row, "code").replace("\r\n", "\n")
    if not task.strip() or not solution.strip():
        return None
    listed = "\n".join(map(str, shown))
    return Example(
        pieces=((f'"""\n{task}\n{listed}\n"""\n', False), (solution, True)),
        question=_ASK_PROGRAM.replace("{tests}", listed).replace("{prompt}", task),
        expected=solution,
        judge="program",
        stops=_PROGRAM_ENDS,
        template=PLAIN,
        program=Program(before="\n".join(filter(None, setup)), after=tests),
    )


def judge_programs(written: Sequence[tuple[str, Example]]) -> list[Verdict]:
    """Run programs, each followed by the tests of its problem.

    Args:
        written: (answer, problem) of each.
    """
    programs = [assembled(text, example) for text, example in written]
    tested = [_tested(program, example) for program, (_, example) in zip(programs, written, strict=True)]
    return [
        Verdict(given=program, right=ran.passed, reason=ran.reason)
        for program, ran in zip(programs, run_programs(tested), strict=True)
    ]


def assembled(text: str, example: Example) -> str:
    """Return the program that a written answer means.

    A code block is taken out of its text. What defines the function stands alone, after the imports and helpers of the
    prompt; everything else continues the prompt.
    """
    program = example.program
    assert program is not None
    blocks = re.findall(r"```(?:\w+)?[ \t]*\n(.*?)(?:\n```|\Z)", text, flags=re.DOTALL)
    defines = rf"^(?:async )?def {re.escape(program.function)}\b" if program.function else r"^(?:async )?def "
    code = next((block for block in blocks if re.search(defines, block, flags=re.MULTILINE)), (blocks or [text])[0])
    if not program.function or re.search(defines, code, flags=re.MULTILINE):
        return f"{program.before}\n{code}" if program.before else code
    return program.prompt + code


def _tested(program: str, example: Example) -> str:
    assert example.program is not None
    return f"{program}\n\n{example.program.after}\n"


def _function(row: Row, *, tests: str) -> Example | None:
    prompt, name, solution = (text_of(row, field) for field in ("prompt", "entry_point", "canonical_solution"))
    if not prompt.strip() or not solution.strip():
        return None
    before = prompt[: prompt.rfind(f"def {name}")] if f"def {name}" in prompt else ""
    return Example(
        pieces=((prompt, False), (solution, True)),
        question=_ASK_FUNCTION.replace("{prompt}", prompt.rstrip()),
        expected=solution,
        judge="program",
        stops=_BODY_ENDS,
        template=PLAIN,
        program=Program(prompt=prompt, before=before, after=tests, function=name),
    )


def _listed(row: Row, field: str) -> list[Any]:
    value = row.get(field)
    if not isinstance(value, list | tuple):
        raise EvaError(f"field {field!r} must hold a list.")
    return list(value)
