"""Accuracy and loss on held-out pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from evatune.hardware import autocast
from evatune.tasks.scores import Metric, Scores
from evatune.tasks.task import evaluating
from evatune.tasks.vision.dataset import Pictures

METRICS = {"accuracy": Metric(columns=("right",), form=".1%"), "loss": Metric(columns=("loss",))}
"""What is reported: the share of pictures classified correctly, and the mean cross-entropy."""


def evaluate(
    model: Any,
    pictures: Pictures,
    collate: Callable[[Any], dict[str, Tensor]],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    bf16: bool = False,
    progress: bool = True,
) -> Scores:
    """Classify pictures.

    Args:
        model: an `ImageClassifier`, with or without adapter; its mode is restored.
        pictures: what to classify, all of a known class.
        collate: makes a batch.
        limit: stop after so many.
        batch_size: pictures in a forward pass.
        bf16: compute in bfloat16 autocast.
        progress: show a bar on a terminal.

    Returns:
        Outcomes of each picture: `right`, `loss` in nats, and the numbers of the classes `expected` and `predicted`.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    n_pictures = min(len(pictures), len(pictures) if limit is None else limit)
    outcomes: dict[str, list[float]] = {"right": [], "loss": [], "expected": [], "predicted": []}
    shown = tqdm(total=n_pictures, desc="evaluate", leave=False, disable=None if progress else True)
    with evaluating(model), shown as bar:
        for start in range(0, n_pictures, batch_size):
            rows = [pictures[index] for index in range(start, min(start + batch_size, n_pictures))]
            labels, logits = _classify(model, collate(rows), device, bf16=bf16)
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            predicted = logits.argmax(dim=-1)
            outcomes["right"] += (predicted == labels).float().tolist()
            outcomes["loss"] += losses.tolist()
            outcomes["expected"] += labels.tolist()
            outcomes["predicted"] += predicted.tolist()
            bar.update(len(rows))
    return Scores(
        headline="accuracy",
        metrics=METRICS,
        outcomes=outcomes,
        counts={"pictures": n_pictures, "skipped": len(pictures.checked.skipped)},
        seconds=time.perf_counter() - started,
    )


@torch.inference_mode()
def _classify(model: Any, batch: dict[str, Tensor], device: torch.device, *, bf16: bool) -> tuple[Tensor, Tensor]:
    """Return labels (B,) and logits (B, K) in float32."""
    with autocast(device, "bfloat16" if bf16 else None):
        logits = model(pixel_values=batch["pixel_values"].to(device)).logits
    return batch["labels"].to(device), logits.float()
