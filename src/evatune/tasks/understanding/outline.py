"""What is known of an understanding task before its model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evatune.models.loading import HEADS
from evatune.tasks.outline import Outline, count_examples, parameters_of, read_shape, rows_away, without_share
from evatune.tasks.rows import may_be_hub_id
from evatune.tasks.understanding.glue import TASKS
from evatune.tasks.understanding.held_out import read_held_out

if TYPE_CHECKING:
    from evatune.tasks.understanding.task import Understanding

_ASSUMED = ("0", "1")
"""Names of the outputs, where they stand in data that are not here."""


def outline(task: Understanding) -> Outline:
    """Return columns, number of examples and the model's shape; see `evatune.tasks.task.Task.outline`."""
    import transformers

    data, kind, source = task.data, task.kind, task.source
    config, notes = read_shape(source)
    stated = data.train_size or (TASKS[data.glue].train_size if data.glue else None)
    if stated is not None and data.validate:
        stated = without_share(stated, data.held_out)
    n_examples, more = count_examples(
        data.train,
        lambda: len(task.examples),
        away=[name for name in data.train if may_be_hub_id(name)],
        stated=stated,
        limit=data.max_train_examples,
    )
    labels = kind.stated or (_ASSUMED if more else task.labels)
    if labels is _ASSUMED:
        more.append(f"the classes are unknown, and {len(_ASSUMED)} are assumed")
    else:
        task.headline_of(labels)
    if data.eval and not data.validate:
        away = [name for name in data.eval if may_be_hub_id(name)]
        more += rows_away([name for name in away if name not in data.train])
        if not away:
            read_held_out(data, kind.converter, seed=task.seed)
    if config is not None:
        config.num_labels = len(labels)
        config.problem_type = kind.problem_type
        config.pad_token_id = config.pad_token_id or 0

    def build() -> nn.Module:
        return getattr(transformers, HEADS[kind.head]).from_config(config, **parameters_of(source))

    def batch(size: int) -> dict[str, Tensor]:
        tokens = torch.zeros(size, data.max_length, dtype=torch.long)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **kind.blank(size, data.max_length)}

    mapped = ", ".join(f"{name} (here {column})" for name, column in (data.columns or {}).items())
    return Outline(
        columns=mapped or kind.columns,
        n_examples=n_examples,
        build=None if config is None else build,
        batch=batch,
        sample=f"{data.max_length} tokens",
        unchecked=(*notes, *more),
    )
