"""Accuracy and loss on held-out texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from evatune.hardware import autocast
from evatune.tasks.scores import Metric, Scores

METRICS = {"accuracy": Metric(columns=("right",), form=".1%"), "loss": Metric(columns=("nll",))}
"""`accuracy`: share of the texts whose most probable class is the right one. `loss`: mean negative log-likelihood of
the right class, in nats."""


@torch.inference_mode()
def evaluate(
    model: Any,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[Any], dict[str, Tensor]],
    *,
    batch_size: int = 32,
    dropped: int = 0,
    bf16: bool = False,
    progress: bool = True,
) -> Scores:
    """Classify texts.

    Args:
        model: a classifier, with or without adapter; its mode is restored.
        rows: tokens and labels of the held-out texts.
        collate: makes a padded batch of rows.
        batch_size: texts in a forward pass; texts of like length share one.
        dropped: rows that were left out before, for the counts.
        bf16: compute in bfloat16 autocast.
        progress: show a bar on a terminal.

    Returns:
        Outcomes of each text: `right`, `nll`, and the numbers of the classes `expected` and `predicted`.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    outcomes = {name: [0.0] * len(rows) for name in ("right", "nll", "expected", "predicted")}
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(rows), desc="evaluate", unit="row", leave=False, disable=None if progress else True) as bar:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in chosen]).items()}
                labels = batch.pop("labels")
                with autocast(device, "bfloat16" if bf16 else None):
                    logits = model(**batch).logits.float()
                found = {
                    "right": logits.argmax(dim=-1) == labels,
                    "nll": torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
                    "expected": labels,
                    "predicted": logits.argmax(dim=-1),
                }
                for name, values in found.items():
                    for index, value in zip(chosen, values.tolist(), strict=True):
                        outcomes[name][index] = float(value)
                bar.update(len(chosen))
    finally:
        model.train(was_training)
    return Scores(
        headline="accuracy",
        metrics=METRICS,
        outcomes=outcomes,
        counts={"examples": len(rows), "dropped": dropped},
        seconds=time.perf_counter() - started,
    )
