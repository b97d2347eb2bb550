"""What is known of a generation task before its model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evatune.errors import near_misses
from evatune.models.sources import locate
from evatune.tasks.examples import Examples, gather
from evatune.tasks.generation.answers import check_judges
from evatune.tasks.generation.example import Example
from evatune.tasks.generation.formats import FORMATS, Format, find_format, fitting_format
from evatune.tasks.generation.named import GROUPS, NAMED, expanded, places, stated_size
from evatune.tasks.generation.settings import GenerationData
from evatune.tasks.outline import Outline, count_examples, parameters_of, read_shape, rows_away
from evatune.tasks.rows import Row, may_be_hub_id

if TYPE_CHECKING:
    from evatune.tasks.generation.task import Generation


def outline(task: Generation) -> Outline:
    """Return columns, number of examples and the model's shape; see `evatune.tasks.task.Task.outline`."""
    from transformers import AutoModelForCausalLM

    data = task.data
    config, notes = read_shape(task.source)
    has_tokenizer = not notes and isinstance(locate(task.source.name, task.source.gguf_file), Path)
    found: list[Format] = []
    away = _away(data.train, data)
    n_examples, more = count_examples(
        data.train,
        lambda: len(_read(task, has_tokenizer=has_tokenizer, found=found)),
        away=away,
        stated=data.train_size or stated_size(data.train),
        limit=data.max_train_examples,
    )
    more += _held_out_notes(task, has_tokenizer=has_tokenizer, noted=away)
    if data.packing:
        n_examples = None
        more.append("how many rows packing makes is known only from the tokens")

    def batch(size: int) -> dict[str, Tensor]:
        tokens = torch.zeros(size, data.max_length, dtype=torch.long)
        return {"input_ids": tokens, "labels": tokens}

    options = parameters_of(task.source)
    return Outline(
        columns=_columns(data, found),
        n_examples=n_examples,
        build=None if config is None else lambda: AutoModelForCausalLM.from_config(config, **options),
        batch=batch,
        sample=f"{data.max_length} tokens",
        unchecked=(*notes, *more),
    )


def _away(sources: Sequence[str], data: GenerationData) -> list[str]:
    """Return the sources that are on a hub; a name that is nearly that of a task has the latter beside it."""
    tasks = [*GROUPS, *NAMED]
    away = [name for name in sources if may_be_hub_id(name) and not (data.folder and name in tasks)]
    return [name if name in tasks or "/" in name else f"{name}{near_misses(name, tasks)}" for name in away]


def _held_out_notes(task: Generation, *, has_tokenizer: bool, noted: Sequence[str]) -> list[str]:
    """Read what is scored, as far as it is here, and return what could not be checked.

    Raises:
        EvaError: it cannot be read, or a package that judges its answers is missing.
    """
    data = task.data
    if data.validate or not data.eval:
        return []
    names = expanded(data.eval)
    places(names, folder=data.folder, held_out=True)
    away = _away(data.eval, data)
    programs = any(name in NAMED and NAMED[name].programs for name in names)
    if not away:
        read = _read(task, has_tokenizer=has_tokenizer, found=[], held_out=True)
        examples = [example for example in read if isinstance(example, Example)]
        programs = any(example.program for example in examples)
        if data.scoring != "likelihood" and len(examples) == len(read):
            check_judges(examples, allow_code_execution=True)
    notes = rows_away([name for name in away if name not in noted])
    if programs and data.scoring != "likelihood" and not data.allow_code_execution:
        notes.append("a run needs --allow-code-execution, since its score needs programs of the model to be run")
    return notes


def _read(task: Generation, *, has_tokenizer: bool, found: list[Format], held_out: bool = False) -> Examples[Any]:
    """Return the examples to learn from or to score on, and note the formats; without tokenizer, chats stay unread."""
    data = task.data

    def converter(row: Row, name: str, file: str) -> Any:
        form = fitting_format(data.format, row, source=file)
        if form not in found:
            found.append(form)
        if form.is_chat and not has_tokenizer:
            return dict
        return find_format(data.format, row, source=file, tokenizer=task.tokenizer if form.is_chat else None)

    names = expanded(data.eval if held_out else data.train)
    return gather(
        names,
        converter,
        places=places(names, folder=data.folder, held_out=held_out),
        on_disk=data.streaming,
        **data.reading("held out" if held_out else "training"),
    )


def _columns(data: GenerationData, found: list[Format]) -> str:
    """Return the fields that a row must have, with the names that the source has for them."""
    if not found and data.format == "auto":
        homes = dict.fromkeys(NAMED[name].hub for name in expanded(data.train) if name in NAMED)
        return f"those of {', '.join(homes)}" if homes else f"those of one of the formats {', '.join(FORMATS)}"
    shown = {field: f"{field} (here {column})" for field, column in (data.columns or {}).items()}
    return "; or ".join(
        ", ".join(shown.get(field, field) for field in form.fields) for form in found or [FORMATS[data.format]]
    )
