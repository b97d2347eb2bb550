"""How a row of a data set becomes a prompt and a completion.

Each format names the fields that it reads and turns one row into one `Example`, or into None where the row has no
answer. Only the format's template stands between prompt and completion.
The templates of `commonsense` and `metamath` are those of Table 5 in the paper (arXiv:2410.07170, Appendix B).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evatune.errors import EvaError, near_misses
from evatune.tasks.generation.conversations import is_conversation, read_messages, written
from evatune.tasks.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = None
"""Template of formats that the tokenizer's chat template writes."""
PLAIN = "{prompt}"
_LINE = "{prompt}\n"
_STEPS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response: Let's think step by step.\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)


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
    convert: Callable[..., Example | None]
    """One row to one example, or None if its answer is missing; with `is_chat` also takes the tokenizer."""
    is_chat: bool = False
    """Whether the tokenizer's chat template writes it."""


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if isinstance(value, Mapping | list | tuple | bytes):
        raise EvaError(f"field {field!r} holds a {type(value).__name__}, which is not a string.")
    return "" if value is None else str(value)


def _of(template: str, prompt: str, completion: str) -> Example | None:
    if not completion.strip():
        return None
    pieces = ((template.replace("{prompt}", prompt), False), (completion, True))
    return Example(pieces=pieces, template=template)


def _commonsense(row: Row) -> Example | None:
    """Read an instruction that ends in `Answer format: a/b/c`, and an output that ends in the answer."""
    instruction, output, answer = _text(row, "instruction"), _text(row, "output"), _text(row, "answer")
    if row.get("input"):
        instruction = f"{instruction}\n{_text(row, 'input')}"
    example = _of(_LINE, instruction, output)
    listed = re.search(r"Answer format:\s*(\S+)\s*$", instruction)
    if example is None or not answer:
        return None
    choices = tuple(listed[1].split("/")) if listed else ()
    if answer not in choices or not output.endswith(answer):
        return example
    stem = output.removesuffix(answer)
    return Example(
        pieces=example.pieces,
        choices=tuple(stem + choice for choice in choices),
        answer=choices.index(answer),
        template=_LINE,
    )


def _gsm8k(row: Row) -> Example | None:
    return _of(_STEPS, _text(row, "question"), _text(row, "answer"))


def _metamath(row: Row) -> Example | None:
    return _of(_STEPS, _text(row, "query"), _text(row, "response"))


def _alpaca(row: Row) -> Example | None:
    """Read an instruction, perhaps an input, and an output."""
    extra = _text(row, "input")
    prompt, output = _text(row, "instruction"), _text(row, "output")
    if not extra.strip() or not output.strip():
        return _of(_ALPACA, prompt, output)
    text = _ALPACA_INPUT.replace("{prompt}", prompt).replace("{input}", extra)
    return Example(pieces=((text, False), (output, True)), template=_ALPACA)


def _completion(row: Row) -> Example | None:
    """Read a prompt and a completion; with a list of `choices` that holds the completion, it is a question."""
    example, choices = _of(PLAIN, _text(row, "prompt"), _text(row, "completion")), tuple(row.get("choices") or ())
    if example is None or example.completion not in choices:
        return example
    return Example(pieces=example.pieces, choices=choices, answer=choices.index(example.completion))


def _plain_text(row: Row) -> Example | None:
    return Example(pieces=((_text(row, "text"), True),)) if _text(row, "text").strip() else None


def _messages(row: Row, tokenizer: PreTrainedTokenizerBase, *, field: str = "messages") -> Example | None:
    """Read a conversation; every turn of the assistant is learned."""
    turns = row[field] or []
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    pieces = written(read_messages(turns), tokenizer, tools=row.get("tools"))
    return _conversation(pieces)


def _conversations(row: Row, tokenizer: PreTrainedTokenizerBase) -> Example | None:
    return _messages(row, tokenizer, field="conversations")


def _completion_of_turns(row: Row, tokenizer: PreTrainedTokenizerBase) -> Example | None:
    """Read a prompt and a completion that are turns; those of the completion are learned."""
    sides = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[field]
        sides.append(read_messages([{"role": role, "content": value}] if isinstance(value, str) else value or []))
    prompt, completion = sides
    pieces = written([*prompt, *completion], tokenizer, tools=row.get("tools"), first_learned=len(prompt))
    return _conversation(pieces)


def _conversation(pieces: list[tuple[str, bool]]) -> Example | None:
    return Example(pieces=tuple(pieces), special_tokens=False, template=CHAT) if pieces else None


FORMATS: dict[str, Format] = {
    "commonsense": Format(fields=("instruction", "output", "answer"), convert=_commonsense),
    "alpaca": Format(fields=("instruction", "output"), convert=_alpaca),
    "gsm8k": Format(fields=("question", "answer"), convert=_gsm8k),
    "metamath": Format(fields=("query", "response"), convert=_metamath),
    "completion": Format(fields=("prompt", "completion"), convert=_completion),
    "messages": Format(fields=("messages",), convert=_messages, is_chat=True),
    "sharegpt": Format(fields=("conversations",), convert=_conversations, is_chat=True),
    "text": Format(fields=("text",), convert=_plain_text),
}
_COMPLETION_OF_TURNS = Format(fields=("prompt", "completion"), convert=_completion_of_turns, is_chat=True)


def find_format(
    name: str, row: Row, *, source: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> Callable[[Row], Example | None]:
    """Return what makes an example of each row of a source.

    Args:
        name: a key of `FORMATS`, or `auto`: the first format whose fields are there.
        row: the data set's first row.
        source: what errors call the data set.
        tokenizer: writes conversations.

    Raises:
        EvaError: the fields fit no format, or not this one, or a chat template is needed and missing.
    """
    fitting = [known for known, form in FORMATS.items() if set(form.fields) <= set(row)]
    if name == "auto":
        if not fitting:
            known = "; ".join(f"{known}: {', '.join(form.fields)}" for known, form in FORMATS.items())
            raise EvaError(
                f"{source} has the fields {', '.join(map(str, row))}, which fit no known format ({known}); say with "
                "columns which field is which (columns: {prompt: question, completion: reply})."
            )
        name = fitting[0]
    if name not in FORMATS:
        raise EvaError(
            f"there is no data format {name!r}{near_misses(name, FORMATS)}; known are auto, {', '.join(FORMATS)}."
        )
    if name not in fitting:
        missing = [field for field in FORMATS[name].fields if field not in row]
        raise EvaError(f"{source} lacks {', '.join(missing)} of format {name!r}; it has {', '.join(map(str, row))}.")
    form = FORMATS[name]
    if name == "completion" and (is_conversation(row["prompt"]) or is_conversation(row["completion"])):
        form = _COMPLETION_OF_TURNS
    if not form.is_chat:
        return form.convert
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise EvaError(
            f"{source} holds conversations, which need a tokenizer with a chat template, and this one has none."
        )
    return lambda row: form.convert(row, tokenizer)
