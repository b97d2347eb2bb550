"""What is known of an understanding task before its model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evatune.models.loading import HEADS
from evatune.tasks.outline import Outline, count_examples, parameters_of, read_shape
from evatune.tasks.rows import may_be_hub_id
from evatune.tasks.understanding.glue import TASKS
from evatune.tasks.understanding.settings import UnderstandingData

if TYPE_CHECKING:
    from evatune.tasks.understanding.task import Understanding

_COLUMNS = {
    "auto": "text (and text_pair, or other usual names), label",
    "token-classification": "words or tokens, and their tags",
    "question-answering": "question, context, answers",
}
_ASSUMED = 2


def outline(task: Understanding) -> Outline:
    """Return columns, number of examples and the model's shape; see `evatune.tasks.task.Task.outline`."""
    import transformers

    data, kind, source = task.data, task.kind, task.source
    config, notes = read_shape(source)
    n_examples, more = count_examples(
        data.train,
        lambda: len(task.examples),
        away=[name for name in data.train if may_be_hub_id(name)],
        stated=data.train_size or (TASKS[data.glue].train_size if data.glue else None),
        limit=data.max_train_examples,
    )
    n_outputs = _known_outputs(data) if more else len(task.labels)
    if n_outputs is None:
        n_outputs = _ASSUMED
        more.append(f"the classes are unknown, and {_ASSUMED} are assumed")
    if config is not None:
        config.num_labels = n_outputs
        config.problem_type = "regression" if n_outputs == 1 else "single_label_classification"
        config.pad_token_id = config.pad_token_id or 0

    def build() -> nn.Module:
        return getattr(transformers, HEADS[kind.head]).from_config(config, **parameters_of(source))

    def batch(size: int) -> dict[str, Tensor]:
        tokens = torch.zeros(size, data.max_length, dtype=torch.long)
        shape = tokens.shape if kind.head == "token-classification" else (size,)
        dtype = torch.float32 if n_outputs == 1 else torch.long  # numbers, or numbers of classes
        targets = {name: torch.zeros(shape, dtype=dtype) for name in kind.targets}
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **targets}

    mapped = ", ".join(f"{name} (here {column})" for name, column in (data.columns or {}).items())
    usual = f"those of GLUE's {data.glue}" if data.glue else _COLUMNS.get(data.kind, _COLUMNS["auto"])
    return Outline(
        columns=mapped or usual,
        n_examples=n_examples,
        build=None if config is None else build,
        batch=batch,
        sample=f"{data.max_length} tokens",
        unchecked=(*notes, *more),
    )


def _known_outputs(data: UnderstandingData) -> int | None:
    """Return how many outputs the head has, where that is known without data."""
    if data.kind == "question-answering":
        return 2
    if data.kind == "regression" or (data.glue and not TASKS[data.glue].classes):
        return 1
    classes = data.classes or (TASKS[data.glue].classes if data.glue else ())
    return len(classes) or None
