"""Labelled texts from tables, and the same as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from evatune.errors import EvaError, near_misses
from evatune.tasks.examples import Convert
from evatune.tasks.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_COLUMNS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
"""Usual names of the columns of text, those of pairs first."""
LABEL_COLUMNS = ("label", "labels", "class")
"""Usual names of the column of labels."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One text, or a pair, and its class."""

    texts: tuple[str, ...]
    """The text, or both."""
    label: str
    """Name of the class."""


class EncodedTexts(Dataset[dict[str, Any]]):
    """Tokens and numbers of classes.

    Args:
        rows: the tokenizer's outputs and `labels` of each example.
        truncated: examples that were longer than the longest allowed sequence.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], *, truncated: int) -> None:
        self.rows, self.truncated = tuple(rows), truncated

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def find_columns(row: Row, source: str) -> Convert[Labelled]:
    """Return what makes an example of each row of a source.

    Args:
        row: its first row.
        source: what errors call it.

    Raises:
        EvaError: no usual column of text or of labels is there.
    """
    names = next((names for names in TEXT_COLUMNS if set(names) <= set(row)), None)
    label = next((name for name in LABEL_COLUMNS if name in row), None)
    if names is None or label is None:
        missing = "text" if names is None else "label"
        raise EvaError(
            f"{source} has no column of {missing}s that is known; it has {', '.join(map(str, row))}: say which it is "
            f"with columns ({missing}=NAME)."
        )
    return lambda row: _labelled(row, names, label)


def _labelled(row: Row, names: Sequence[str], label: str) -> Labelled | None:
    texts = tuple(row[name] for name in names)
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            raise EvaError(f"column {name!r} holds {text!r}, which is not a string.")
    value = row[label]
    # Public benchmarks write -1 for a hidden label.
    if value is None or str(value).strip() in ("", "-1") or not any(text.strip() for text in texts):
        return None
    return Labelled(texts=texts, label=str(value).strip())


def classes_of(examples: Sequence[Labelled]) -> tuple[str, ...]:
    """Return the names of all classes: numbers by size, other names by the alphabet.

    Raises:
        EvaError: there is only one class.
    """
    names = {example.label for example in examples}
    if len(names) < 2:
        raise EvaError(f"all training texts are of class {next(iter(names))!r}; a classifier needs two at least.")
    if all(name.lstrip("-").isdigit() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def encode_texts(
    examples: Sequence[Labelled],
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: Sequence[str],
    max_length: int,
) -> EncodedTexts:
    """Tokenize examples.

    Args:
        examples: what to tokenize.
        tokenizer: the model's tokenizer; it adds its special tokens.
        classes: names of all classes in the order of their numbers.
        max_length: longest sequence in tokens.

    Raises:
        EvaError: a label is none of the classes.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    rows: list[dict[str, Any]] = []
    truncated = 0
    for example in examples:
        if example.label not in numbers:
            raise EvaError(
                f"label {example.label!r} is no class of the training data{near_misses(example.label, classes)}; "
                f"they are {', '.join(classes)}."
            )
        whole: Mapping[str, Any] = tokenizer(*example.texts, verbose=False)
        if len(whole["input_ids"]) > max_length:
            truncated += 1
            whole = tokenizer(*example.texts, truncation=True, max_length=max_length)
        rows.append(dict(whole) | {"labels": numbers[example.label]})
    return EncodedTexts(rows, truncated=truncated)
