"""Texts and pairs of texts with one label each, from tables, and the same as tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evatune.errors import EvaError
from evatune.tasks.disk_list import empty_list
from evatune.tasks.examples import Convert
from evatune.tasks.rows import Row
from evatune.tasks.understanding.glue import TASKS
from evatune.tasks.understanding.kind import Encoded
from evatune.tasks.understanding.settings import UnderstandingData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAPPED = (("text", "text_pair"), ("text",))
"""Names of the columns of text after `data.columns`."""
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
LABEL_COLUMNS = ("label", "labels", "class", "score")
"""Usual names of the column of labels."""


SEPARATOR = " ⏐ "
"""Stands between the texts of a pair for people."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One text, or a pair, and its label."""

    texts: tuple[str, ...]
    """The text, or both."""
    label: str
    """Name of the class, or the number as a string."""


def find_columns(
    row: Row, source: str, *, data: UnderstandingData, read_label: Callable[[str], str | None]
) -> Convert[Labelled]:
    """Return what makes an example of each row of a source.

    Args:
        row: its first row.
        source: what errors call it.
        data: says the task of GLUE, and which columns are mapped.
        read_label: makes a label of a string that is not empty, or returns None for a hidden one.

    Raises:
        EvaError: no known column of text or of labels is there.
    """
    texts, labels = _columns(data)
    names = next((names for names in texts if set(names) <= set(row)), None)
    label = next((name for name in labels if name in row), None)
    if names is None or label is None:
        missing, known = ("text", [" and ".join(names) for names in texts]) if names is None else ("label", [*labels])
        raise EvaError(
            f"{source} has no column of {missing}s that is known ({', '.join(known)}); it has "
            f"{', '.join(map(str, row))}: say which it is with columns ({missing}=NAME)."
        )
    return lambda row: _labelled(row, names, label, read_label)


def known_columns(data: UnderstandingData) -> str:
    """Return the columns that are looked for, for people."""
    texts, labels = _columns(data)
    return f"{' or '.join('+'.join(names) for names in texts)}; and {' or '.join(labels)}"


def _columns(data: UnderstandingData) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    task = TASKS[data.glue] if data.glue else None
    texts = (*(MAPPED if data.columns else ()), *(task.texts if task else TEXT_COLUMNS))
    labels = (*(("label",) if data.columns else ()), *(task.labels if task else LABEL_COLUMNS))
    return tuple(dict.fromkeys(texts)), tuple(dict.fromkeys(labels))


def _labelled(row: Row, names: Sequence[str], label: str, read_label: Callable[[str], str | None]) -> Labelled | None:
    texts = tuple("" if row.get(name) is None else row[name] for name in names)
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            raise EvaError(f"column {name!r} holds {text!r}, which is not a string.")
    value = row.get(label)
    given = "" if value is None else str(value).strip()
    read = read_label(given) if given and any(text.strip() for text in texts) else None
    return None if read is None else Labelled(texts=texts, label=read)


def encode_texts(
    examples: Sequence[Labelled],
    tokenizer: PreTrainedTokenizerBase,
    *,
    target: Callable[[str], int | float],
    max_length: int,
    on_disk: bool,
) -> Encoded:
    """Tokenize examples.

    Args:
        examples: what to tokenize.
        tokenizer: the model's tokenizer; it adds its special tokens and says at which side it cuts.
        target: what is learned of a label.
        max_length: longest sequence in tokens.
        on_disk: keep the tokens in a temporary file.
    """
    rows = empty_list(on_disk=on_disk)
    cut = 0
    for example in examples:
        whole: Mapping[str, Any] = tokenizer(*example.texts, verbose=False)
        if len(whole["input_ids"]) > max_length:
            cut += 1
            whole = tokenizer(*example.texts, truncation=True, max_length=max_length)
        rows.append(dict(whole) | {"labels": target(example.label)})
    return Encoded(rows, cut=cut)
