"""What is known of a generation task before its model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evatune.models.sources import locate
from evatune.tasks.examples import gather
from evatune.tasks.generation.formats import FORMATS, Format, find_format, fitting_format
from evatune.tasks.generation.named import GROUPS, NAMED, expanded, places, stated_size
from evatune.tasks.generation.settings import GenerationData
from evatune.tasks.outline import Outline, count_examples, parameters_of, read_shape
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
    n_examples, more = count_examples(
        data.train,
        lambda: _count(task, has_tokenizer=has_tokenizer, found=found),
        away=[
            name
            for name in data.train
            if may_be_hub_id(name) and not (data.folder and (name in NAMED or name in GROUPS))
        ],
        stated=data.train_size or stated_size(data.train),
        limit=data.max_train_examples,
    )

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


def _count(task: Generation, *, has_tokenizer: bool, found: list[Format]) -> int:
    """Return how many rows are trained on, and note the formats; without tokenizer, conversations are not read."""
    data = task.data

    def converter(row: Row, name: str) -> Any:
        form = fitting_format(data.format, row, source=name)
        if form not in found:
            found.append(form)
        if form.is_chat and not has_tokenizer:
            return dict
        return find_format(data.format, row, source=name, tokenizer=task.tokenizer if form.is_chat else None)

    names = expanded(data.train)
    return len(
        gather(
            names,
            converter,
            places=places(names, folder=data.folder, held_out=False),
            limit=data.max_train_examples,
            split=data.train_split,
            hub_config=data.hub_config,
            columns=data.columns,
            part="training" if data.validate else "all",
            share=data.held_out,
            on_disk=data.streaming,
        )
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
