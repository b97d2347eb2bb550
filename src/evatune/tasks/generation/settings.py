"""The `data:` section of recipes whose task is generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evatune.errors import EvaError
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
        "math",
        "humaneval",
        "evalplus",
        "mbpp",
        "completion",
        "messages",
        "sharegpt",
        "text",
    ] = "auto"
    """How a row becomes a prompt and a completion; `auto` chooses by the names of its fields."""
    max_length: int = number(512, low=8)
    """Longest sequence in tokens; `truncation` says what a longer one loses."""
    truncation: Literal["left", "right"] = "left"
    """`left`: the beginning of the prompt goes first, then the end of the completion. `right`: the end goes."""
    packing: bool = False
    """Put several training examples into one row of `max_length` tokens, none of which sees another one; a batch is
    then so many rows."""
    bucketing: bool = False
    """Train on batches of examples of like length, so that less of them is padding; their order is less random."""
    train_on_prompt: bool = False
    """Also learn the tokens of the prompt."""
    scoring: Literal["likelihood", "generated", "both"] = "likelihood"
    """How held-out examples are scored: by the likelihood of what is right, by answers that the model writes, or
    both."""
    max_new_tokens: int = number(256, low=1)
    """Longest written answer in tokens."""
    temperature: float = number(0.0, low=0)
    """Randomness of written answers; 0 takes the most probable token each time."""
    top_p: float = number(1.0, above=0, high=1)
    """Written answers take the most probable tokens that have this share together."""
    samples: int = number(1, low=1)
    """Written answers to each held-out prompt; more than one needs a temperature above 0."""
    chat: bool = False
    """Put prompts and completions of every format into the tokenizer's chat template."""
    allow_code_execution: bool = False
    """Run the programs that the model writes for programming problems, under limits, in processes of their own."""
    eval_batch_tokens: int = number(2048, low=1)
    """Tokens that are scored or written at a time, padding included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing and self.bucketing:
            raise EvaError("data.packing fills rows already, so data.bucketing does nothing; leave one of them out.")
        if self.samples > 1 and not self.temperature:
            raise EvaError(
                f"data.samples is {self.samples}, but with data.temperature 0 all answers are equal; set a temperature."
            )

    def metrics(self) -> tuple[str, ...]:
        """Return the names of the numbers that scores can have; which of them depends on the examples."""
        likelihood = ("loss", "exact", "accuracy")
        written = ("generated", *(f"pass@{k}" for k in sorted({1, 10, 100, self.samples}) if k <= self.samples))
        return {"likelihood": likelihood, "generated": written, "both": (*likelihood, *written)}[self.scoring]
