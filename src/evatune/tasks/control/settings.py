"""The `data:` section of recipes whose task is control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from evatune.settings import Section, number
from evatune.tasks.settings import path_setting


@dataclass(frozen=True, kw_only=True)
class ControlData(Section):
    """Episodes to learn from, and environments to act in."""

    section: ClassVar[str] = "data"

    train: tuple[str, ...] = path_setting(())
    """Environments (`hammer`, `MT40`), whose scripted policies give the episodes, or folders of Minari data sets."""
    eval: tuple[str, ...] = ()
    """Environments to act in, before and after training; by default those of the training data."""
    episodes: int = number(20, low=1)
    """Training episodes of each environment, the first ones of its data set."""
    eval_episodes: int = number(20, low=0)
    """Episodes to act in each environment, with goals that no training episode had; 0 for none."""
    noise: float = number(0.1, low=0)
    """Standard deviation of the noise on the actions of scripted policies, which run from -1 to 1."""
    episode_seed: int = number(0, low=0)
    """Seed of the episodes that scripted policies give."""
    target_return: float | None = None
    """Return that is asked for when acting; by default the best of the training episodes in that environment."""
    video: str | None = path_setting(None)
    """Folder for a GIF of one episode of each environment, written after each evaluation."""
    context: int | None = number(None, low=1)
    """Steps that the model looks back; by default those of the pretrained model, 50 for a new one."""
    dropout: float = number(0.2, low=0, high=0.9)
    """Dropout of a new model."""
    reward_tokens: bool = True
    """Also give a new model the reward of each step: four tokens a step instead of three."""
    time_steps: bool = False
    """Also tell a new model the number of the step in its episode."""
