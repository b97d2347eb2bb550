"""How a row of a data set becomes a prompt and a completion.

Each format names the fields that it reads and turns one row into one `Example`, or into None where the row has no
answer.
The templates of `commonsense` and `metamath` are those of Table 5 in the paper (arXiv:2410.07170, Appendix B).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evatune.errors import EvaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]

_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response: Let's think step by step.\n"
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text, in pieces that are learned and pieces that are only read."""

    pieces: tuple[tuple[str, bool], ...]
    """(text, learned) in order; the text of the example is their concatenation."""
    choices: tuple[str, ...] = ()
    """For a multiple-choice question, every possible completion."""
    answer: int | None = None
    """Index of the right choice."""
    special_tokens: bool = True
    """Whether the tokenizer adds its begin and end tokens; a chat template has written them already."""

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

    def _last_learned(self) -> int:
        return max(index for index, (_, learned) in enumerate(self.pieces) if learned)


@dataclass(frozen=True, kw_only=True)
class Format:
    """The fields that a format reads, and how."""

    fields: tuple[str, ...]
    """Fields that every row must have."""
    convert: Callable[[Row], Example | None]
    """One row to one example, or None if its answer is missing."""


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    return "" if value is None else str(value)


def _of(prompt: str, completion: str) -> Example | None:
    return Example(pieces=((prompt, False), (completion, True))) if completion.strip() else None


def _commonsense(row: Row) -> Example | None:
    """Read an instruction that ends in `Answer format: a/b/c`, and an output that ends in the answer."""
    instruction, output, answer = _text(row, "instruction"), _text(row, "output"), _text(row, "answer")
    if row.get("input"):
        instruction = f"{instruction}\n{row['input']}"
    example = _of(f"{instruction}\n", output)
    listed = re.search(r"Answer format:\s*(\S+)\s*$", instruction)
    if example is None or not answer:
        return None
    choices = tuple(listed[1].split("/")) if listed else ()
    if answer not in choices or not output.endswith(answer):
        return example
    stem = output.removesuffix(answer)
    return Example(
        pieces=example.pieces, choices=tuple(stem + choice for choice in choices), answer=choices.index(answer)
    )


def _gsm8k(row: Row) -> Example | None:
    return _of(_INSTRUCTION.format(_text(row, "question")), _text(row, "answer"))


def _metamath(row: Row) -> Example | None:
    return _of(_INSTRUCTION.format(_text(row, "query")), _text(row, "response"))


def _completion(row: Row) -> Example | None:
    """Read a prompt and a completion; with a list of `choices` that holds the completion, it is a question."""
    example, choices = _of(_text(row, "prompt"), _text(row, "completion")), tuple(row.get("choices") or ())
    if example is None or example.completion not in choices:
        return example
    return Example(pieces=example.pieces, choices=choices, answer=choices.index(example.completion))


def _plain_text(row: Row) -> Example | None:
    return Example(pieces=((_text(row, "text"), True),)) if _text(row, "text").strip() else None


def _messages(row: Row, tokenizer: PreTrainedTokenizerBase) -> Example | None:
    """Write a conversation with the tokenizer's chat template; every turn of the assistant is learned."""
    messages = row["messages"] or []

    def written(count: int, **options: Any) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)) if count else ""

    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message.get("role") != "assistant" or not message.get("content"):
            continue
        before, after = written(index, add_generation_prompt=True), written(index + 1)
        if not before.startswith(done) or not after.startswith(before):
            raise EvaError(
                "this tokenizer's chat template rewrites earlier turns when a new one follows, so turns cannot be "
                "learned one by one; give prompt and completion fields instead."
            )
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return Example(pieces=tuple(pieces), special_tokens=False) if pieces else None


FORMATS: dict[str, Format] = {
    "commonsense": Format(fields=("instruction", "output", "answer"), convert=_commonsense),
    "gsm8k": Format(fields=("question", "answer"), convert=_gsm8k),
    "metamath": Format(fields=("query", "response"), convert=_metamath),
    "completion": Format(fields=("prompt", "completion"), convert=_completion),
    "messages": Format(fields=("messages",), convert=_messages),  # type: ignore[arg-type]
    "text": Format(fields=("text",), convert=_plain_text),
}


def find_format(name: str, fields: Iterable[str], *, source: str, tokenizer: Any = None) -> Format:
    """Return the format called `name`, or for `auto` the one whose fields are there.

    Args:
        name: a key of `FORMATS`, or `auto`.
        fields: names of the fields of the data set's first row.
        source: what errors call the data set.
        tokenizer: needed for `messages`.

    Raises:
        EvaError: the fields fit no format, or not this one, or a chat template is needed and missing.
    """
    fields = list(fields)
    fitting = [known for known, form in FORMATS.items() if set(form.fields) <= set(fields)]
    if name == "auto":
        if not fitting:
            known = "; ".join(f"{known}: {', '.join(form.fields)}" for known, form in FORMATS.items())
            raise EvaError(f"{source} has the fields {', '.join(fields)}, which fit no known format ({known}).")
        name = fitting[0]
    if name not in FORMATS:
        raise EvaError(f"there is no data format {name!r}; known are auto, {', '.join(FORMATS)}.")
    if name not in fitting:
        missing = [field for field in FORMATS[name].fields if field not in fields]
        raise EvaError(f"{source} lacks {', '.join(missing)} of format {name!r}; it has {', '.join(fields)}.")
    if name != "messages":
        return FORMATS[name]
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise EvaError(f"{source} holds messages, which need a tokenizer with a chat template, and this one has none.")
    return Format(fields=("messages",), convert=lambda row: _messages(row, tokenizer))
