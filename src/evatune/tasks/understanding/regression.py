"""Regression: a number for a text or for a pair, such as how alike two sentences are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.tasks.examples import Convert
from evatune.tasks.rows import Row
from evatune.tasks.scores import Metric
from evatune.tasks.understanding.glue import TASKS
from evatune.tasks.understanding.kind import Encoded, Outcomes
from evatune.tasks.understanding.settings import UnderstandingData
from evatune.tasks.understanding.texts import SEPARATOR, Labelled, encode_texts, find_columns, known_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BOTH = ("expected", "predicted")
METRICS = {
    "pearson": Metric(columns=_BOTH, statistic="pearson", form=".3f"),
    "spearman": Metric(columns=_BOTH, statistic="spearman", form=".3f"),
    "loss": Metric(columns=("squared_error",)),
}
"""`pearson` and `spearman`: correlations of the predicted with the expected numbers. `loss`: mean squared error."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """See `evatune.tasks.understanding.kind.Kind`."""

    data: UnderstandingData
    head = "sequence-classification"
    task_type = "SEQ_CLS"
    problem_type = "regression"
    targets = ("labels",)
    too_long = "cut at the {cut}"

    stated = ("number",)

    @property
    def columns(self) -> str:
        """The columns of texts and labels."""
        return known_columns(self.data)

    @property
    def label_range(self) -> tuple[float, ...] | None:
        """Lowest and highest label."""
        return self.data.label_range or (TASKS[self.data.glue].label_range if self.data.glue else None)

    def converter(self, row: Row, source: str) -> Convert[Labelled]:
        """Return what makes a labelled text of each row."""
        return find_columns(row, source, data=self.data, read_label=self._read)

    def _read(self, label: str) -> str | None:
        try:
            number = float(label)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise EvaError(f"label {label!r} is not a number.")
        low, high = self.label_range or (-math.inf, math.inf)
        if low <= number <= high:
            return label
        if number == -1:  # how public benchmarks write a hidden label
            return None
        raise EvaError(f"label {label} is out of range: it must be from {low:g} to {high:g} (label_range).")

    def labels(self, examples: Sequence[Labelled]) -> tuple[str, ...]:
        """Return the name of the one output.

        Raises:
            EvaError: all numbers are equal.
        """
        if len({float(example.label) for example in examples}) < 2:
            raise EvaError(f"all training texts have the label {examples[0].label}; a regression needs two at least.")
        return self.stated

    def encode(
        self,
        examples: Sequence[Labelled],
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str],
        max_length: int,
        on_disk: bool = False,
    ) -> Encoded:
        """Return tokens and numbers."""
        return encode_texts(examples, tokenizer, target=float, max_length=max_length, on_disk=on_disk)

    def blank(self, size: int, length: int) -> dict[str, Tensor]:
        """Return numbers."""
        return {"labels": torch.zeros(size)}

    def outputs(self, output: Any) -> Tensor:
        """Return the number."""
        return output.logits

    def metrics(self, labels: Sequence[str]) -> Mapping[str, Metric]:
        """Return the metrics."""
        return METRICS

    def outcomes(
        self, outputs: Sequence[Tensor], encoded: Encoded, examples: Sequence[Labelled], labels: Sequence[str]
    ) -> Outcomes:
        """Return the numbers `expected` and `predicted`, and their `squared_error`."""
        predicted = torch.stack(list(outputs)).squeeze(-1).double()
        expected = torch.tensor([row["labels"] for row in encoded.rows], dtype=torch.float64)
        columns = {"expected": expected, "predicted": predicted, "squared_error": (predicted - expected) ** 2}
        return Outcomes(
            columns={name: values.tolist() for name, values in columns.items()},
            told=[
                {"question": SEPARATOR.join(one.texts), "expected": float(one.label), "given": given}
                for one, given in zip(examples, predicted.tolist(), strict=True)
            ],
        )

    def learned(self, row: dict[str, Any], labels: Sequence[str]) -> str:
        """Return the number."""
        return f"{row['labels']:g}"

    def facts(self, examples: Sequence[Labelled], labels: Sequence[str]) -> dict[str, Any]:
        """Return the lowest and the highest label."""
        numbers = [float(example.label) for example in examples]
        return {"lowest_label": min(numbers), "highest_label": max(numbers)}

    def about(self, labels: Sequence[str]) -> str:
        """Return what is learned."""
        return "1 number"
