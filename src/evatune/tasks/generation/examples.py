"""Prompts and completions from files or from a hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evatune.tasks.examples import Examples, gather
from evatune.tasks.generation.formats import Example, find_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_examples(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Examples[Example]:
    """Read prompts and completions.

    Args:
        sources: files (.jsonl, .json, .csv, .tsv, .parquet), which are mixed, or a hub data set id.
        format: a key of `FORMATS`, or `auto`: what the fields of each source's first row fit.
        tokenizer: writes conversations (`messages`) with its chat template.
        options: `limit`, `seed`, `split`, `hub_config` and `columns` of `evatune.tasks.examples.gather`.

    Returns:
        The examples; rows without an answer are dropped and counted.

    Raises:
        EvaError: a source is missing or unreadable, its fields do not fit, or no example is left.
    """
    return gather(
        sources,
        lambda row, name: find_format(format, row, source=name, tokenizer=tokenizer),
        **options,
    )
