"""The `data:` section of recipes whose task is generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evatune.settings import number
from evatune.tasks.settings import RowSettings, path_setting


@dataclass(frozen=True, kw_only=True)
class GenerationData(RowSettings):
    """The training data and the held-out data: prompts and completions, conversations, or plain text."""

    train: tuple[str, ...] = path_setting(())
    """Training files (.jsonl, .json, .csv, .tsv, .parquet) and named tasks (`commonsense`, `commonsense/boolq`,
    `metamath`), which are mixed, or one hub data set id."""
    eval: tuple[str, ...] = path_setting(())
    """Held-out files, named tasks or hub data set id, scored before and after training; also one by one."""
    folder: str | None = path_setting(None)
    """Folder with copies of the named tasks (`FOLDER/commonsense/boolq/train.json`); by default they come from the
    hub."""
    format: Literal[
        "auto",
        "commonsense",
        "boolq",
        "piqa",
        "siqa",
        "hellaswag",
        "winogrande",
        "arc",
        "openbookqa",
        "alpaca",
        "gsm8k",
        "metamath",
        "completion",
        "messages",
        "sharegpt",
        "text",
    ] = "auto"
    """How a row becomes a prompt and a completion; `auto` chooses by the names of its fields."""
    max_length: int = number(512, low=8)
    """Longest sequence in tokens; a longer one loses the beginning of its prompt, then the end of its completion."""
    train_on_prompt: bool = False
    """Also learn the tokens of the prompt."""
