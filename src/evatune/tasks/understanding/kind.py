"""What differs between the kinds of understanding: the rows, the head, the outcomes. One kind is one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from evatune.tasks.examples import Convert
from evatune.tasks.rows import Row
from evatune.tasks.scores import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(Dataset[dict[str, Any]]):
    """Examples as the model takes them.

    Args:
        rows: the tokenizer's outputs and the labels.
        cut: examples that were longer than the longest allowed sequence.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], *, cut: int = 0) -> None:
        self.rows, self.cut = tuple(rows), cut

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What a model gave for all examples."""

    columns: Mapping[str, Sequence[float]]
    """One number an example, by name."""
    metrics: Mapping[str, Metric]
    """The metrics of these columns, the usual headline first."""


class Kind(Protocol):
    """One kind of understanding; it is made of the settings of the `data:` section."""

    head: str
    """Head of the model, see `evatune.models.load_model`."""
    task_type: str
    """PEFT's task type."""

    def converter(self, row: Row, source: str) -> Convert[Any]:
        """Return what makes an example of each row of a source, of which the first row is given."""

    def labels(self, examples: Sequence[Any]) -> tuple[str, ...]:
        """Return the names of the outputs of the head."""

    def encode(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, *, labels: Sequence[str], max_length: int
    ) -> Encoded:
        """Return the examples as tokens and labels."""

    def outcomes(self, outputs: Sequence[Tensor], rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> Outcomes:
        """Return the outcomes from the outputs of the head, one tensor a row, in float32 on the processor."""

    def learned(self, row: dict[str, Any], labels: Sequence[str]) -> str:
        """Return what is learned of a row, for people."""

    def facts(self, examples: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Return the labels of the training data as plain values."""
