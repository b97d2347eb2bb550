"""The outputs of a model for held-out texts, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from evatune.hardware import autocast
from evatune.tasks.journal import Journal
from evatune.tasks.scores import Metric, Scores
from evatune.tasks.task import evaluating
from evatune.tasks.understanding.kind import Kind, Outcomes

PART = "outputs"
"""What a journal calls the outputs of the head."""


@torch.inference_mode()
def predict(
    model: Any,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[Any], dict[str, Tensor]],
    *,
    kind: Kind,
    batch_size: int = 32,
    bf16: bool = False,
    progress: bool = True,
    journal: Journal | None = None,
) -> list[Tensor]:
    """Return the outputs of the head for each row, without padding, in float32 on the processor.

    Args:
        model: a model with its head, with or without adapter; its mode is restored.
        rows: tokens and labels of the held-out texts.
        collate: makes a padded batch of rows.
        kind: what is learned.
        batch_size: rows in a forward pass; rows of like length share one.
        bf16: compute in bfloat16 autocast.
        progress: show a bar on a terminal.
        journal: keeps what each batch gave, and knows what was computed before.
    """
    device = next(model.parameters()).device
    outputs = {index: torch.tensor(values) for index, values in (journal.known(PART) if journal else {}).items()}
    order = sorted(set(range(len(rows))) - set(outputs), key=lambda index: (-len(rows[index]["input_ids"]), index))
    with (
        evaluating(model),
        tqdm(
            total=len(rows),
            initial=len(outputs),
            desc="evaluate",
            unit="row",
            leave=False,
            disable=None if progress else True,
        ) as bar,
    ):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in chosen]).items()}
            inputs = {name: tensor for name, tensor in batch.items() if name not in kind.targets}
            with autocast(device, "bfloat16" if bf16 else None):
                found = kind.outputs(model(**inputs)).float().cpu()
            kept = batch["attention_mask"].bool().cpu()
            for index, output, mask in zip(chosen, found, kept, strict=True):
                outputs[index] = output[mask] if found.ndim > 2 else output
            if journal is not None:
                journal.add(PART, [(index, outputs[index].tolist()) for index in chosen])
            bar.update(len(chosen))
    return [outputs[index] for index in range(len(rows))]


def scores_of(
    outcomes: Outcomes,
    *,
    metrics: Mapping[str, Metric],
    headline: str,
    sets: Sequence[str],
    counts: Mapping[str, int],
    seconds: float,
) -> Scores:
    """Return the scores of all examples, and the headline of each held-out set if there are several.

    Args:
        outcomes: of all examples.
        metrics: of these outcomes.
        headline: the one of them that is reported first.
        sets: which held-out set each example is from; each of several has a metric such as `accuracy (name)`.
        counts: see `Scores`.
        seconds: time that it took.
    """
    metrics, columns = dict(metrics), dict(outcomes.columns)
    names = sorted(set(sets))
    for name in names if len(names) > 1 else ():
        apart = {column: f"{column} ({name})" for column in metrics[headline].columns}
        for column, own in apart.items():
            columns[own] = [value for value, of in zip(columns[column], sets, strict=True) if of == name]
        metrics[f"{headline} ({name})"] = replace(metrics[headline], columns=tuple(apart.values()))
    told = [{"set": name, **one} if len(names) > 1 else one for name, one in zip(sets, outcomes.told, strict=True)]
    return Scores(
        headline=headline,
        metrics=metrics,
        outcomes=columns,
        counts={**counts, **outcomes.counts},
        seconds=seconds,
        examples=told,
    )
