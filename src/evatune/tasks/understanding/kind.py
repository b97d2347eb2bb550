"""What differs between the kinds of understanding: the rows, the head, the outcomes. One kind is one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from evatune.tasks.disk_list import DiskList
from evatune.tasks.examples import Convert
from evatune.tasks.rows import Row
from evatune.tasks.scores import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(Dataset[dict[str, Any]]):
    """Examples as the model takes them.

    Args:
        rows: the tokenizer's outputs, the targets, and what the outcomes need besides.
        cut: examples that were longer than the longest allowed sequence.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], *, cut: int = 0) -> None:
        self.rows, self.cut = rows if isinstance(rows, DiskList) else tuple(rows), cut

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What a model gave for all examples."""

    columns: Mapping[str, Sequence[float]]
    """One number an example, by name."""
    told: Sequence[Mapping[str, Any]]
    """Of each example its `question`, what was `expected`, what was `given`, and `right` where one can tell."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What else was counted."""


class Kind(Protocol):
    """One kind of understanding; it is made of the settings of the `data:` section."""

    head: str
    """Head of the model, see `evatune.models.load_model`."""
    task_type: str
    """PEFT's task type."""
    problem_type: Literal["single_label_classification", "regression"] | None
    """What transformers computes the loss by; it must not come from the checkpoint."""
    targets: tuple[str, ...]
    """Names of what is learned in a row and in a batch."""
    too_long: str
    """What happens to longer sequences, for people; `{cut}` stands for the side of the setting."""

    @property
    def stated(self) -> tuple[str, ...] | None:
        """Names of the outputs of the head, where they are known without data."""

    @property
    def columns(self) -> str:
        """The columns that a row must have, for people."""

    def converter(self, row: Row, source: str) -> Convert[Any]:
        """Return what makes an example of each row of a source, of which the first row is given."""

    def labels(self, examples: Sequence[Any]) -> tuple[str, ...]:
        """Return the names of the outputs of the head."""

    def encode(
        self,
        examples: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str],
        max_length: int,
        on_disk: bool = False,
    ) -> Encoded:
        """Return the examples as tokens and targets; they may stand in a temporary file."""

    def blank(self, size: int, length: int) -> dict[str, Tensor]:
        """Return targets of a batch of so many rows and tokens; their values mean nothing."""

    def outputs(self, output: Any) -> Tensor:
        """Return the numbers of the head from a model's output: (rows, ...) or (rows, tokens, ...)."""

    def metrics(self, labels: Sequence[str]) -> Mapping[str, Metric]:
        """Return the metrics of the outcomes, the usual headline first."""

    def outcomes(
        self, outputs: Sequence[Tensor], encoded: Encoded, examples: Sequence[Any], labels: Sequence[str]
    ) -> Outcomes:
        """Return the outcomes of all examples.

        Args:
            outputs: numbers of the head, one tensor a row, without padding, in float32 on the processor.
            encoded: the examples as tokens.
            examples: the same as they were read.
            labels: names of the outputs.
        """

    def learned(self, row: dict[str, Any], labels: Sequence[str]) -> str:
        """Return what is learned of a row, for people."""

    def facts(self, examples: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Return the labels of the training data as plain values."""

    def about(self, labels: Sequence[str]) -> str:
        """Return the same in a few words."""
