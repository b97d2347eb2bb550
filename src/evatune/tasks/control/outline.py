"""What is known of a control task before its model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evatune.tasks.control.model import DecisionTransformer, checked_config
from evatune.tasks.control.names import environment_names
from evatune.tasks.outline import Outline, read_shape

if TYPE_CHECKING:
    from evatune.tasks.control.task import Control


def outline(task: Control) -> Outline:
    """Return what episodes are needed and the model's shape; see `evatune.tasks.task.Task.outline`."""
    data, source = task.data, task.source
    notes: list[str] = []
    config: Any
    path = Path(source.name).expanduser()
    if source.name.startswith("new:") or path.exists() or (source.config is None and path.is_absolute()):
        config = task.config
    else:
        config, notes = read_shape(source)
        config = config and checked_config(config, name=source.name, context=data.context)
    stored = [name for name in data.train if Path(name).expanduser().exists()]
    played = [name for name in data.train if name not in stored]
    environment_names(played)  # one that is unknown is an error
    if not data.train:
        notes.append("no training data were given (data.train, --data)")
    if stored:
        notes.append(f"the episodes in {', '.join(stored)} were not read")

    def batch(size: int) -> dict[str, Tensor]:
        shape = (size, config.context)
        return {
            "states": torch.zeros(*shape, config.state_size),
            "actions": torch.zeros(*shape, config.action_size),
            "rewards": torch.zeros(shape),
            "returns_to_go": torch.zeros(shape),
            "timesteps": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }

    first = f"{data.episodes:,} episodes of {', '.join(played)}, which are collected first" if played else ""
    return Outline(
        columns=first or "episodes in Minari's format: observations, actions, rewards",
        build=None if config is None else lambda: DecisionTransformer(config),
        batch=batch,
        sample=f"{config.context if config is not None else data.context} steps of an episode",
        unchecked=tuple(notes),
    )
