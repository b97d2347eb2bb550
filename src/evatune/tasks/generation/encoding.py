"""From examples to token ids, labels and padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from evatune.errors import EvaError
from evatune.settings import IGNORED_LABEL
from evatune.tasks.disk_list import empty_list
from evatune.tasks.generation.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = IGNORED_LABEL
"""Label of a position that the loss leaves out."""
_AT_A_TIME = 256
"""Examples that are tokenized together."""


@dataclass(frozen=True, kw_only=True)
class EncodedExamples(Dataset[dict[str, list[int]]]):
    """Token ids and labels, ready for a data loader."""

    rows: Sequence[dict[str, list[int]]]
    """`input_ids` and `labels` of each example."""
    truncated: int
    """Examples that were longer than the longest allowed sequence."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    train_on_prompt: bool = False,
    truncation: str = "left",
    on_disk: bool = False,
) -> EncodedExamples:
    """Tokenize examples; labels are -100 wherever nothing is learned.

    Prompt and completion are tokenized as one string. A token belongs to the piece that contains its last character. If
    the last piece is learned, the tokenizer's end token follows it.

    Args:
        examples: what to tokenize.
        tokenizer: a fast tokenizer (it must know which characters a token covers).
        max_length: longest sequence in tokens.
        train_on_prompt: learn the prompts too.
        truncation: what a sequence that is too long loses: `left` the beginning of its prompt, then the end of its
            completion, `right` its end.
        on_disk: keep the tokens in a temporary file, not in memory.

    Raises:
        EvaError: the tokenizer is not a fast one, or the disk is full.
    """
    if not tokenizer.is_fast:
        raise EvaError(
            f"{type(tokenizer).__name__} cannot tell which characters a token covers; use the model's fast tokenizer."
        )
    rows = empty_list(on_disk=on_disk)
    truncated = 0
    for begin in range(0, len(examples), _AT_A_TIME):
        for row in _tokenized(examples[begin : begin + _AT_A_TIME], tokenizer, train_on_prompt=train_on_prompt):
            truncated += len(row["input_ids"]) > max_length
            rows.append(_shorten(row, max_length, truncation))
    return EncodedExamples(rows=rows, truncated=truncated)


def _tokenized(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, train_on_prompt: bool
) -> list[dict[str, list[int]]]:
    rows: list[dict[str, list[int]]] = [{} for _ in examples]
    for special in (True, False):
        chosen = [index for index, example in enumerate(examples) if example.special_tokens is special]
        if not chosen:
            continue
        tokens = tokenizer(
            [examples[index].text for index in chosen],
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for index, ids, offsets in zip(chosen, tokens["input_ids"], tokens["offset_mapping"], strict=True):
            labels = _labels(examples[index], ids, offsets, train_on_prompt=train_on_prompt)
            if special and examples[index].pieces[-1][1] and tokenizer.eos_token_id is not None:
                ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
                if ids[-2:-1] == ids[-1:] and labels[-2] == IGNORED:  # the tokenizer had added an end token itself
                    ids, labels = ids[:-1], [*labels[:-2], labels[-1]]
            rows[index] = {"input_ids": ids, "labels": labels}
    return rows


def _labels(
    example: Example, ids: Sequence[int], offsets: Sequence[tuple[int, int]], *, train_on_prompt: bool
) -> list[int]:
    learned = [part for text, part in example.pieces for part in [part] * len(text)]
    return [
        token if start < end and (train_on_prompt or learned[end - 1]) else IGNORED
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]


def _shorten(row: dict[str, list[int]], max_length: int, truncation: str) -> dict[str, list[int]]:
    if truncation == "right":
        return {key: values[:max_length] for key, values in row.items()}
    return cut_prompt([row], max_length)[0]


def cut_prompt(rows: list[dict[str, list[int]]], max_length: int) -> list[dict[str, list[int]]]:
    """Return rows without the beginning of their prompt as far as the longest needs it, then without their end.

    Args:
        rows: `input_ids` and `labels`, all with the same prompt; the same objects are returned where all are short.
        max_length: longest row in tokens.
    """
    excess = max(len(row["input_ids"]) for row in rows) - max_length
    if excess <= 0:
        return rows
    first = next((index for index, label in enumerate(rows[0]["labels"]) if label != IGNORED), 0)
    # Keep the first token (the begin token of most models), and one prompt token before the first learned one.
    cut = max(0, min(excess, first - 2))
    return [{key: (values[:1] + values[1 + cut :])[:max_length] for key, values in row.items()} for row in rows]


class Collator:
    """Pads examples to the longest of a batch, on the right."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_token_id = 0 if pad is None else pad  # any id will do, since the attention mask hides it

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each of shape (examples, longest).

        Packed rows have `position_ids` in place of the mask.
        """
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor([[*line, *[fill] * (longest - len(line))] for line in values])

        if "position_ids" in rows[0]:  # packed; see `evatune.tasks.generation.packing`
            fills = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0}
            return {name: padded([row[name] for row in rows], fill) for name, fill in fills.items()}
        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }
