"""The `data:` section of recipes whose task is generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evatune.settings import number
from evatune.tasks.settings import RowSettings


@dataclass(frozen=True, kw_only=True)
class GenerationData(RowSettings):
    """The training data and the held-out data: prompts and completions, conversations, or plain text."""

    format: Literal[
        "auto", "commonsense", "alpaca", "gsm8k", "metamath", "completion", "messages", "sharegpt", "text"
    ] = "auto"
    """How a row becomes a prompt and a completion; `auto` chooses by the names of its fields."""
    max_length: int = number(512, low=8)
    """Longest sequence in tokens; a longer one loses the beginning of its prompt, then the end of its completion."""
    train_on_prompt: bool = False
    """Also learn the tokens of the prompt."""
