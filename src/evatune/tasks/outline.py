"""What is known of a run before its model is loaded: columns, the model's shape, a batch without values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from evatune.models.loading import local_config
from evatune.tasks.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A task without weights. Nothing of it asks a hub."""

    columns: str
    """What a row of the data must have."""
    n_examples: int | None = None
    """Training examples; None where they cannot be counted here."""
    build: Callable[[], nn.Module] | None = None
    """Makes the model with its head, without weights: it is called where tensors take no memory. None where the model's
    configuration cannot be read here."""
    batch: Callable[[int], dict[str, Tensor]]
    """Returns a batch of so many examples with labels, each as long as the settings allow; its values mean nothing."""
    sample: str
    """What one example of that batch is, in words."""
    unchecked: tuple[str, ...] = ()
    """Sentences on what could not be checked here."""


def read_shape(source: ModelSettings) -> tuple[PretrainedConfig | None, list[str]]:
    """Return the configuration of a model's folder, of `model.config` or of a model that is here otherwise, with notes.

    Raises:
        EvaError: there is no such model, or no such file.
    """
    if source.config is None or Path(source.name).expanduser().is_dir():
        config = local_config(
            source.name,
            gguf_file=source.gguf_file,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
        if config is not None:
            return config, []
    if source.config is None:
        return None, [
            f"the model {source.name} is not on this machine and model.config names no file with its configuration, so "
            "targets, parameters and memory are unknown"
        ]
    config = local_config(source.config, trust_remote_code=source.trust_remote_code)
    return config, [f"the model's shape was read from {source.config}, not from {source.name}"]


def count_examples(
    sources: Sequence[str],
    count: Callable[[], int],
    *,
    away: Sequence[str],
    stated: int | None,
    limit: int | None,
) -> tuple[int | None, list[str]]:
    """Return the number of training examples, and what could not be checked.

    Args:
        sources: of the training data.
        count: counts them; it is called only where all sources are here.
        away: the sources that are on a hub.
        stated: the number that the settings state.
        limit: the largest number that the settings let through.
    """
    if not sources:
        notes = ["no training data were given (data.train, --data)"]
    elif away:
        notes = rows_away(away)
    else:
        return count(), []
    if stated is None:
        return None, [*notes, "without data.train_size their number is unknown"]
    return min(stated, limit or stated), notes


def rows_away(names: Sequence[str]) -> list[str]:
    """Return what is said of data that are on a hub."""
    return [f"the rows of {', '.join(names)} are on a hub, so their columns were not looked at"] if names else []


def without_share(count: int, share: float) -> int:
    """Return how many of so many examples are trained on if this share of them is held out."""
    return count - max(1, round(share * count))


def parameters_of(source: ModelSettings) -> dict[str, Any]:
    """Return what a model without weights is made with."""
    import torch

    return {"dtype": getattr(torch, source.dtype), "trust_remote_code": source.trust_remote_code}
