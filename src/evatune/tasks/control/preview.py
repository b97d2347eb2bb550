"""Showing training examples: windows as the model sees them, and a filmstrip of their episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evatune.errors import EvaError
from evatune.tasks.control.episodes import Episode
from evatune.tasks.control.filmstrip import Strip, frames, sheet
from evatune.tasks.task import LEARNED, Preview

N_PICTURES, N_STEPS_SHOWN = 7, 3
"""Pictures of an episode, and steps of a window, the last ones."""


def preview(examples: Sequence[tuple[Episode, Mapping[str, np.ndarray]]]) -> Preview:
    """Return windows as text, and their episodes as a filmstrip if they have a seed and this machine can draw.

    Args:
        examples: an episode and a window of it each.
    """
    content = [_example(episode, window) for episode, window in examples]
    text = "\n\n".join(_shown(number, example) for number, example in enumerate(content, 1))
    try:
        picture = _strip([episode for episode, _ in examples])
    except EvaError as error:
        why = str(error).rstrip(".")
        return Preview(text=f"{text}\n\nno pictures: {why}", content=content, without_picture=why)
    return Preview(text=text, content=content, picture=picture)


def _example(episode: Episode, window: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "environment": episode.environment,
        "seed": episode.seed,
        "return": episode.total_return,
        **{name: values.tolist() for name, values in window.items()},
    }


def _shown(number: int, example: Mapping[str, Any]) -> str:
    steps = example["timesteps"]
    left, right = LEARNED
    lines = [
        f"── example {number}: {example['environment']}, steps {steps[0]} to {steps[-1]} of an episode of return "
        f"{example['return']:.0f}, all actions learned {left} {right}"
    ]
    for index in range(max(0, len(steps) - N_STEPS_SHOWN), len(steps)):
        state = " ".join(f"{value:.2f}" for value in example["states"][index])
        action = " ".join(f"{value:.2f}" for value in example["actions"][index])
        lines += [
            f"step {steps[index]}: return-to-go {example['returns_to_go'][index]:.1f} · state {state}",
            f"  action {left}{action}{right} · reward {example['rewards'][index]:.2f}",
        ]
    return "\n".join(lines)


def _strip(episodes: Sequence[Episode]) -> bytes:
    for episode in episodes:
        if episode.seed is None:
            raise EvaError(f"the episodes of {episode.environment} do not say which seed they began with.")
    strips = []
    for episode in dict.fromkeys(episodes):  # several windows may be of one episode
        steps = np.linspace(0, len(episode) - 1, N_PICTURES).astype(int).tolist()
        assert episode.seed is not None
        pictures = frames(episode.environment, seed=episode.seed, actions=episode.actions, steps=steps)
        title = f"{episode.environment}, return {episode.total_return:.0f}"
        strips.append(Strip(title=title, pictures=pictures, captions=[f"step {step}" for step in steps]))
    return sheet(strips)
