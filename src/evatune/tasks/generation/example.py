"""One string that a model learns or answers, and the parts that it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evatune.errors import EvaError
from evatune.tasks.rows import Row

PLAIN = "{prompt}"
"""The template of prompts that stand alone."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What makes a program of a written answer, and tests it."""

    after: str
    """The tests; they raise where the program is wrong."""
    before: str = ""
    """Imports and helpers that come before it."""
    prompt: str = ""
    """What an answer continues that does not define the function itself."""
    function: str = ""
    """The function that is tested; empty for any."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training string, in pieces that are learned and pieces that are only read."""

    pieces: tuple[tuple[str, bool], ...]
    """(string, learned) in order; the concatenation of the strings is what the model reads."""
    choices: tuple[str, ...] = ()
    """For a multiple-choice question, every possible completion."""
    answer: int | None = None
    """Index of the right choice."""
    special_tokens: bool = True
    """Whether the tokenizer adds its begin and end tokens; false if a chat template has written them already."""
    template: str | None = PLAIN
    """The template around such a prompt, see `evatune.models.prompts.PromptTemplate`."""
    question: str = ""
    """What was asked, without template."""
    expected: str = ""
    """The right answer, in the form that a written answer is read in."""
    judge: str = ""
    """How a written answer is judged, see `evatune.tasks.generation.answers`; empty where none can be."""
    stops: tuple[str, ...] = ()
    """Strings that end a written answer."""
    program: Program | None = None
    """For a programming problem, what a written answer is tested with."""
    task: str = ""
    """Name of the task or of the file that it comes from; scores are also given for each."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(text for text, _ in self.pieces)

    @property
    def prompt(self) -> str:
        """What stands before the last learned piece."""
        return "".join(text for text, _ in self.pieces[: self._last_learned()])

    @property
    def completion(self) -> str:
        """The last learned piece."""
        return self.pieces[self._last_learned()][0]

    @property
    def asked(self) -> str:
        """What the model was asked, without template; of a program that it only continues, this is the prompt."""
        continues = self.program is not None and self.template is not None
        return self.prompt if continues or not self.question else self.question

    def _last_learned(self) -> int:
        return max(index for index, (_, learned) in enumerate(self.pieces) if learned)


def text_of(row: Row, field: str) -> str:
    """Return a field of a row as text, empty where it is missing.

    Raises:
        EvaError: the field holds something that is not text.
    """
    value = row.get(field)
    if isinstance(value, Mapping | list | tuple | bytes):
        raise EvaError(f"field {field!r} holds a {type(value).__name__}, which is not a string.")
    return "" if value is None else str(value)


def prompted(template: str, prompt: str, completion: str) -> Example | None:
    """Return an example whose prompt stands in a template, or None if its completion is empty."""
    if not completion.strip():
        return None
    pieces = ((template.replace("{prompt}", prompt), False), (completion, True))
    return Example(pieces=pieces, template=template, question=prompt)
