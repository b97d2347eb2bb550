"""How a row of a data set becomes a prompt and a completion.

Each format names the fields that it reads and turns one row into one `Example`, or into None where the row has no
answer. Only the format's template stands between prompt and completion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evatune.errors import EvaError, near_misses
from evatune.tasks.generation import commonsense, mathematics, programming
from evatune.tasks.generation.conversations import is_conversation, read_messages, written
from evatune.tasks.generation.example import PLAIN, Example, prompted, text_of
from evatune.tasks.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = None
"""Template of formats that the tokenizer's chat template writes."""
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
class Format:
    """The fields that a format reads, and how."""

    fields: tuple[str, ...]
    """Fields that every row must have."""
    convert: Callable[..., Example | None]
    """One row to one example, or None if its question or answer is missing; with `is_chat` also takes the tokenizer."""
    question: str = ""
    """The field without which there is nothing to answer; rows where it is empty are left out."""
    is_chat: bool = False
    """Whether the tokenizer's chat template writes it."""


def _alpaca(row: Row) -> Example | None:
    """Read an instruction, perhaps an input, and an output."""
    extra = text_of(row, "input")
    prompt, output = text_of(row, "instruction"), text_of(row, "output")
    if not extra.strip() or not output.strip():
        return prompted(_ALPACA, prompt, output)
    text = _ALPACA_INPUT.replace("{prompt}", prompt).replace("{input}", extra)
    return Example(pieces=((text, False), (output, True)), template=_ALPACA, question=f"{prompt}\n\n{extra}")


def _completion(row: Row) -> Example | None:
    """Read a prompt and a completion; with a list of `choices`, one of which is the completion, it is a question."""
    example = prompted(PLAIN, text_of(row, "prompt"), text_of(row, "completion"))
    choices = tuple(row.get("choices") or ())
    if example is None or not choices:
        return example
    if example.completion not in choices:
        listed = ", ".join(map(repr, choices))
        raise EvaError(f"field 'completion' is {example.completion!r}, but must be one of the choices, {listed}.")
    answer = choices.index(example.completion)
    return replace(example, choices=choices, answer=answer, expected=example.completion, judge="choice")


def _plain_text(row: Row) -> Example | None:
    return Example(pieces=((text_of(row, "text"), True),)) if text_of(row, "text").strip() else None


def _messages(row: Row, tokenizer: PreTrainedTokenizerBase, *, field: str = "messages") -> Example | None:
    """Read a conversation; every turn of the assistant is learned."""
    turns = row.get(field) or []
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
        value = row.get(field)
        sides.append(read_messages([{"role": role, "content": value}] if isinstance(value, str) else value or []))
    prompt, completion = sides
    pieces = written([*prompt, *completion], tokenizer, tools=row.get("tools"), first_learned=len(prompt))
    return _conversation(pieces)


def _conversation(pieces: list[tuple[str, bool]]) -> Example | None:
    return Example(pieces=tuple(pieces), special_tokens=False, template=CHAT) if pieces else None


FORMATS: dict[str, Format] = {
    "commonsense": Format(
        fields=("instruction", "output", "answer"), convert=commonsense.templated, question="instruction"
    ),
    "boolq": Format(fields=("passage", "question", "answer"), convert=commonsense.boolq, question="question"),
    "piqa": Format(fields=("goal", "sol1", "sol2", "label"), convert=commonsense.piqa, question="goal"),
    "siqa": Format(
        fields=("context", "question", "answerA", "answerB", "answerC", "label"),
        convert=commonsense.siqa,
        question="question",
    ),
    "hellaswag": Format(
        fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        convert=commonsense.hellaswag,
        question="ctx_a",
    ),
    "winogrande": Format(
        fields=("sentence", "option1", "option2", "answer"), convert=commonsense.winogrande, question="sentence"
    ),
    "arc": Format(fields=("question", "choices", "answerKey"), convert=commonsense.arc, question="question"),
    "openbookqa": Format(
        fields=("question_stem", "choices", "answerKey"), convert=commonsense.openbookqa, question="question_stem"
    ),
    "alpaca": Format(fields=("instruction", "output"), convert=_alpaca, question="instruction"),
    "gsm8k": Format(fields=("question", "answer"), convert=mathematics.gsm8k, question="question"),
    "metamath": Format(fields=("query", "response"), convert=mathematics.metamath, question="query"),
    "math": Format(fields=("problem", "solution"), convert=mathematics.math, question="problem"),
    "humaneval": Format(
        fields=("prompt", "entry_point", "canonical_solution", "test"), convert=programming.humaneval, question="prompt"
    ),
    "evalplus": Format(
        fields=("prompt", "entry_point", "canonical_solution", "base_input", "plus_input"),
        convert=programming.evalplus,
        question="prompt",
    ),
    "mbpp": Format(fields=("code", "test_list"), convert=programming.mbpp),
    "completion": Format(fields=("prompt", "completion"), convert=_completion, question="prompt"),
    "messages": Format(fields=("messages",), convert=_messages, is_chat=True),
    "sharegpt": Format(fields=("conversations",), convert=_conversations, is_chat=True),
    "text": Format(fields=("text",), convert=_plain_text),
}
"""All formats; `auto` takes the first whose fields are there."""
_COMPLETION_OF_TURNS = Format(fields=("prompt", "completion"), convert=_completion_of_turns, is_chat=True)


def in_chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return an example whose prompt and completion are written with the tokenizer's chat template.

    Raises:
        EvaError: the tokenizer has none.
    """
    if example.template is CHAT:
        return example
    if not getattr(tokenizer, "chat_template", None):
        raise EvaError(
            "data.chat needs a tokenizer with a chat template, and this one has none; name one with "
            "model.chat_template."
        )
    turns = [("user", example.question or example.prompt), ("assistant", example.completion)]
    pieces = written([{"role": role, "content": content} for role, content in turns], tokenizer)
    return replace(example, pieces=tuple(pieces), special_tokens=False, template=CHAT, stops=())


def find_format(
    name: str, row: Row, *, source: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> Callable[[Row], Example | None]:
    """Return what makes an example of each row of a source.

    Args:
        name: see `fitting_format`.
        row: the data set's first row.
        source: what errors call the data set.
        tokenizer: writes conversations.

    Raises:
        EvaError: the fields fit no format, or not this one, or a chat template is needed and missing.
    """
    form = fitting_format(name, row, source=source)
    if not form.is_chat:
        return lambda row: None if form.question and not text_of(row, form.question).strip() else form.convert(row)
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise EvaError(
            f"{source} holds conversations, which need a tokenizer with a chat template, and this one has none; "
            "name one with model.chat_template."
        )
    return lambda row: form.convert(row, tokenizer)


def fitting_format(name: str, row: Row, *, source: str) -> Format:
    """Return the format of a source.

    Args:
        name: a key of `FORMATS`, or `auto`: the first format whose fields are there.
        row: the data set's first row.
        source: what errors call the data set.

    Raises:
        EvaError: the fields fit no format, or not this one.
    """
    fitting = [known for known, form in FORMATS.items() if set(form.fields) <= set(row)]
    if name == "auto":
        if not fitting:
            raise EvaError(
                f"{source} has the fields {', '.join(map(str, row))}, which fit no known format ({_nearest(row)}); say "
                "with columns which field is which (columns: {prompt: question, completion: reply})."
            )
        name = fitting[0]
    if name not in FORMATS:
        raise EvaError(
            f"there is no data format {name!r}{near_misses(name, FORMATS)}; known are auto, {', '.join(FORMATS)}."
        )
    if name not in fitting:
        missing = [field for field in FORMATS[name].fields if field not in row]
        raise EvaError(f"{source} lacks {', '.join(missing)} of format {name!r}; it has {', '.join(map(str, row))}.")
    if name == "completion" and (is_conversation(row["prompt"]) or is_conversation(row["completion"])):
        return _COMPLETION_OF_TURNS
    return FORMATS[name]


def _nearest(row: Row) -> str:
    """Return what the formats lack that have the most in common with a row, and what prompts and completions lack."""
    lacking = {name: [field for field in form.fields if field not in row] for name, form in FORMATS.items()}
    shared = [name for name, form in FORMATS.items() if len(lacking[name]) < len(form.fields)]
    nearest = sorted(shared, key=lambda name: len(lacking[name]))[:2]
    return "; ".join(f"{name} lacks {', '.join(lacking[name])}" for name in dict.fromkeys([*nearest, "completion"]))
