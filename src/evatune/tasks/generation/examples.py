"""Prompts and completions from files or from a hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evatune.errors import EvaError, near_misses
from evatune.tasks.examples import Examples, gather, short_names
from evatune.tasks.generation.example import Example
from evatune.tasks.generation.formats import find_format, in_chat
from evatune.tasks.generation.named import GROUPS, NAMED, expanded, places
from evatune.tasks.rows import NoSourceError, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_examples(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    folder: str | None = None,
    held_out: bool = False,
    chat: bool = False,
    **options: Any,
) -> Examples[Example]:
    """Read prompts and completions.

    Args:
        sources: files (.jsonl, .json, .csv, .tsv, .parquet), tasks (`commonsense/boolq`) and groups of them, which are
            mixed, or a hub data set id.
        format: a key of `FORMATS`, or `auto`: what the fields of each source's first row fit.
        tokenizer: writes conversations (`messages`) with its chat template.
        folder: holds copies of the named tasks; None takes them from the hub.
        chat: write every format with the chat template.
        held_out: of named tasks take the rows to score on, not those to learn from.
        options: `limit`, `seed`, `split`, `hub_config`, `columns`, `part`, `share` and `on_disk` of
            `evatune.tasks.examples.gather`.

    Returns:
        The examples; rows without a question or an answer are dropped and counted.

    Raises:
        EvaError: a source is missing or unreadable, its fields do not fit, or no example is left.
    """
    given = [sources] if isinstance(sources, str | os.PathLike) else sources
    names = expanded([os.fspath(source) for source in given])
    titles = dict(zip(names, short_names(names), strict=True))

    def converter(row: Row, name: str, file: str) -> Callable[[Row], Example | None]:
        convert = find_format(format, row, source=file, tokenizer=tokenizer)

        def converted(row: Row) -> Example | None:
            example = convert(row)
            if example is not None and chat and tokenizer is not None:
                example = in_chat(example, tokenizer)
            return example and replace(example, task=titles[name])

        return converted

    try:
        return gather(names, converter, places=places(names, folder=folder, held_out=held_out), **options)
    except NoSourceError as error:
        if error.name not in names or not (near := near_misses(error.name, [*GROUPS, *NAMED])):
            raise
        raise EvaError(f"{str(error).removesuffix('.')}; no task has this name either{near}.") from error
