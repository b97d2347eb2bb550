"""Windows of episodes: what a Decision Transformer is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evatune.tasks.control.episodes import Episode


class Windows(Sequence[dict[str, np.ndarray]]):
    """Every window of at most `context` steps that ends at a step of an episode, in a seeded order.

    A policy in an environment gets exactly such windows: shorter than the context only at the start of an episode.
    """

    def __init__(self, episodes: Sequence[Episode], *, context: int, seed: int) -> None:
        self.episodes = list(episodes)
        self.context = context
        self._returns_to_go = [np.cumsum(episode.rewards[::-1])[::-1].copy() for episode in self.episodes]
        ends = [(number, step) for number, episode in enumerate(self.episodes) for step in range(len(episode))]
        self._ends = np.array(ends, dtype=np.int32)[np.random.default_rng(seed).permutation(len(ends))]

    def __len__(self) -> int:
        return len(self._ends)

    def episode(self, index: int) -> Episode:
        """Return the episode that a window is of."""
        return self.episodes[int(self._ends[index][0])]

    def __getitem__(self, index: Any) -> Any:
        number, last = (int(value) for value in self._ends[index])
        steps = slice(max(0, last + 1 - self.context), last + 1)
        episode = self.episodes[number]
        return {
            "states": episode.states[steps],
            "actions": episode.actions[steps],
            "rewards": episode.rewards[steps],
            "returns_to_go": self._returns_to_go[number][steps],
            "timesteps": np.arange(steps.start, steps.stop),
        }


def padded(rows: Sequence[dict[str, np.ndarray]], *, context: int) -> dict[str, Tensor]:
    """Return windows as one batch of `context` steps, padded behind, with an attention mask."""
    batch = {name: np.zeros((len(rows), context, *first.shape[1:]), first.dtype) for name, first in rows[0].items()}
    mask = np.zeros((len(rows), context), np.int64)
    for number, row in enumerate(rows):
        for name, values in row.items():
            batch[name][number, : len(values)] = values
        mask[number, : len(row["rewards"])] = 1
    return {name: torch.from_numpy(values) for name, values in (batch | {"attention_mask": mask}).items()}


def state_statistics(episodes: Sequence[Episode], *, floor: float) -> tuple[Tensor, Tensor]:
    """Return mean and scale of each number of a state: its standard deviation, but at least `floor`.

    Numbers that never change in the data (an object that is absent) get the floor, so that they stay small if they
    change later.
    """
    states = np.concatenate([episode.states for episode in episodes]).astype(np.float64)
    mean, scale = states.mean(0), np.maximum(states.std(0), floor)
    return torch.from_numpy(mean).float(), torch.from_numpy(scale).float()
