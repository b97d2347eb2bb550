"""The settings that every task is opened with: which model, and where its rows are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from evatune.settings import Section, number


def path_setting(default: Any) -> Any:
    """Return a dataclass field for files or folders: in a recipe they are relative to the recipe's own folder."""
    return dataclasses.field(default=default, metadata={"path": True})


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """The pretrained model."""

    section: ClassVar[str] = "model"
    main: ClassVar[str] = "name"

    name: str = path_setting("")
    """Hub id, local folder, `.gguf` file, or `package:NAME` for the model inside an installed Python package."""
    gguf_file: str | None = None
    """Name of the GGUF file inside the folder or hub repository that `name` points to."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the frozen base weights are held in."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""
    chat_template: str | None = path_setting(None)
    """File with a chat template (Jinja) for a tokenizer that has none, or another one than wanted."""
    config: str | None = path_setting(None)
    """File with the model's configuration (`config.json`), which `--dry-run` reads where the model is not here."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    """Training data and held-out data that are rows of files; a domain adds its own fields."""

    section: ClassVar[str] = "data"
    main: ClassVar[str] = "train"

    train: tuple[str, ...] = path_setting(())
    """Training files (.jsonl, .json, .csv, .tsv, .parquet; several are mixed) or one hub data set id."""
    eval: tuple[str, ...] = path_setting(())
    """Held-out files or hub data set id, evaluated before and after training."""
    hub_config: str | None = None
    """Name of the configuration of a hub data set, for example `main`."""
    train_split: str = "train"
    """Split of a hub data set that `train` means."""
    eval_split: str = "test"
    """Split of a hub data set that `eval` means."""
    max_train_examples: int | None = number(None, low=1)
    """Keep this many training examples, drawn with the seed."""
    max_eval_examples: int | None = number(200, low=1)
    """Keep this many held-out examples, drawn with the seed."""
    train_size: int | None = number(None, low=1)
    """Number of training examples, which `--dry-run` takes where it cannot count them; a run does not look at it."""


@dataclass(frozen=True, kw_only=True)
class RowSettings(DataSettings):
    """Data that are rows of text in tables."""

    validate: bool = False
    """Score on a share of the training examples, which are not trained on then, instead of `eval`: for a search, which
    must not use what is reported."""
    held_out: float = number(0.2, above=0, high=0.9)
    """This share."""
    columns: Mapping[str, str] | None = None
    """Names of the columns in the source, for example `prompt: question`; in a .csv or .tsv file without
    header a column is a number, from 1 on."""
    streaming: bool = False
    """Keep the training examples and their tokens in temporary files, not in memory; batches and order are the same."""

    def reading(self, which: Literal["training", "validation", "held out"]) -> dict[str, Any]:
        """Return how examples are read, as arguments of `evatune.tasks.examples.gather`.

        Args:
            which: those to learn from, the share of them that is scored (`validate`), or those of `eval`.
        """
        learned = which != "held out"
        return {
            "limit": self.max_train_examples if which == "training" else self.max_eval_examples,
            "split": self.train_split if learned else self.eval_split,
            "hub_config": self.hub_config,
            "columns": self.columns,
            "part": which if learned and self.validate else "all",
            "share": self.held_out,
        }
