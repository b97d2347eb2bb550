"""The `data:` section of recipes whose task is understanding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from evatune.errors import EvaError
from evatune.settings import number
from evatune.tasks.settings import RowSettings
from evatune.tasks.understanding.glue import HUB, TASKS

METRICS = {
    "classification": ("accuracy", "matthews", "loss", "f1", "macro_f1"),
    "regression": ("pearson", "spearman", "loss"),
    "token-classification": ("f1", "precision", "recall", "accuracy", "loss"),
    "question-answering": ("f1", "exact", "loss"),
}
"""Names of the metrics of each kind."""


@dataclass(frozen=True, kw_only=True)
class UnderstandingData(RowSettings):
    """Texts and what is learned of them; the columns are `text`, `text_pair` and `label`, or those of `kind`."""

    kind: Literal["auto", "classification", "regression", "token-classification", "question-answering"] = "auto"
    """What is learned: the class of a text or pair, a number, a tag for each word, or where in a text the answer to a
    question stands; `auto` is what the task of GLUE says, else a class."""
    glue: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"] | None = None
    """Task of GLUE: gives columns, classes and headline, and the data on the hub if none are named."""
    classes: tuple[str, ...] | None = None
    """Names of the classes or tags in the order of their numbers; another label is then an error. By default those of
    the training data."""
    headline: str | None = None
    """Metric that is reported first; by default accuracy, Pearson's correlation, or what the task of GLUE says."""
    label_range: tuple[float, ...] | None = None
    """Lowest and highest label of a regression, for example `0,5`; another label is an error."""
    max_length: int = number(128, low=8)
    """Longest sequence in tokens; what is longer is cut, of a pair the longer text."""
    cut: Literal["right", "left"] = "right"
    """Side at which a sequence is cut."""
    stride: int = number(64, low=0)
    """Tokens that two neighbouring windows of a long context share (question-answering)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_range is not None and (len(self.label_range) != 2 or self.label_range[0] >= self.label_range[1]):
            raise EvaError(f"data.label_range is {self.label_range}, but must be two numbers, the lower one first.")
        if self.glue:
            own: dict[str, Any] = {}
            if not self.train and not self.eval:
                own = {"train": (HUB,), "eval": (HUB,), "hub_config": self.glue}
            if self.eval_split == "test":  # the labels of GLUE's test splits are hidden
                own["eval_split"] = TASKS[self.glue].held_out
            for name, value in own.items():
                object.__setattr__(self, name, value)

    @property
    def learned(self) -> str:
        """The kind, `auto` resolved."""
        if self.kind != "auto":
            return self.kind
        return "regression" if self.glue and not TASKS[self.glue].classes else "classification"

    def metrics(self) -> tuple[str, ...]:
        """Return the names of the numbers that scores can have; some depend on how many classes or tags there are."""
        if self.learned != "classification":
            return METRICS[self.learned]
        classes = self.classes or (TASKS[self.glue].classes if self.glue else ())
        left_out = {"macro_f1" if len(classes) == 2 else "f1"} if classes else set()
        return tuple(name for name in METRICS[self.learned] if name not in left_out)
