"""Examples decoded from exactly the tokens that the model reads; the learned parts are marked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from evatune.tasks.generation.encoding import IGNORED
from evatune.tasks.task import LEARNED, Preview

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview(
    rows: Sequence[Mapping[str, Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    templates: Sequence[str | None],
) -> Preview:
    """Return encoded examples as text.

    Args:
        rows: `input_ids` and `labels` of each example.
        tokenizer: the one that made them.
        templates: what the prompt of each example was put into.
    """
    content = [_example(row, tokenizer) | {"template": template} for row, template in zip(rows, templates, strict=True)]
    return Preview(
        text="\n\n".join(_shown(number, example) for number, example in enumerate(content, 1)), content=content
    )


def _example(row: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    learned = [label != IGNORED for label in row["labels"]]
    pieces, done, end = [], "", 0
    for is_learned, group in groupby(learned):
        end += len(list(group))
        # Decode from the beginning: some tokenizers drop the space before the first decoded token.
        text = str(tokenizer.decode(list(row["input_ids"][:end]), clean_up_tokenization_spaces=False))
        pieces.append({"text": text[len(done) :], "learned": is_learned})
        done = text
    return {"pieces": pieces, "tokens": len(learned), "learned_tokens": sum(learned)}


def _shown(number: int, example: Mapping[str, Any]) -> str:
    left, right = LEARNED
    text = "".join(
        f"{left}{piece['text']}{right}" if piece["learned"] else piece["text"] for piece in example["pieces"]
    )
    template = example["template"]
    how = "the tokenizer's chat template" if template is None else f"the template {json.dumps(template)}"
    counts = f"{example['tokens']} tokens, {example['learned_tokens']} learned {left} {right}"
    lines = [f"── example {number}: {counts}"]
    if not example["pieces"][0]["learned"]:
        lines.append(f"── the prompt is written with {how}; the answer follows at once")
    return "\n".join([*lines, text])
