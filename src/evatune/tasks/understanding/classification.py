"""Classification: the class of a text or of a pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evatune.errors import EvaError, near_misses
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
    "accuracy": Metric(columns=("right",), form=".1%"),
    "matthews": Metric(columns=_BOTH, statistic="matthews", form=".3f"),
    "loss": Metric(columns=("nll",)),
}
"""`accuracy`: share of the texts whose most probable class is the right one. `matthews`: Matthews' correlation. `loss`:
mean negative log-likelihood of the right class, in nats."""
F1 = {"f1": Metric(columns=_BOTH, statistic="f1", form=".1%")}
"""Of two classes: the F1 score of the second."""
MACRO_F1 = {"macro_f1": Metric(columns=_BOTH, statistic="macro_f1", form=".1%")}
"""Of more classes: the mean of their F1 scores."""
HIDDEN = ("-1", "-")
"""How public benchmarks write a hidden label, or one that annotators did not agree on."""


@dataclass(frozen=True, kw_only=True)
class Classification:
    """See `evatune.tasks.understanding.kind.Kind`."""

    data: UnderstandingData
    head = "sequence-classification"
    task_type = "SEQ_CLS"
    problem_type = "single_label_classification"
    targets = ("labels",)
    too_long = "cut at the {cut}"

    @property
    def stated(self) -> tuple[str, ...] | None:
        """Names of the classes, where the recipe or the task of GLUE says them."""
        return self.data.classes or (TASKS[self.data.glue].classes if self.data.glue else None)

    @property
    def columns(self) -> str:
        """The columns of texts and labels."""
        return known_columns(self.data)

    def converter(self, row: Row, source: str) -> Convert[Labelled]:
        """Return what makes a labelled text of each row."""
        return find_columns(row, source, data=self.data, read_label=self._read)

    def _read(self, label: str) -> str | None:
        known = self.stated
        if known and label in known:
            return label
        if label in HIDDEN:
            return None
        if not known:
            return label
        if label.isdigit() and int(label) < len(known):
            return known[int(label)]
        raise EvaError(
            f"label {label!r} is no class{near_misses(label, known)}; the classes are "
            f"{', '.join(known)}, by name or by number from 0 to {len(known) - 1}."
        )

    def labels(self, examples: Sequence[Labelled]) -> tuple[str, ...]:
        """Return the names of all classes: as GLUE has them, else numbers by size and other names by the alphabet.

        Raises:
            EvaError: there is only one class.
        """
        names = {example.label for example in examples}
        if len(names) < 2:
            raise EvaError(f"all training texts are of class {next(iter(names))!r}; a classifier needs two at least.")
        if self.stated:
            return self.stated
        if all(name.lstrip("-").isdigit() for name in names):
            return tuple(sorted(names, key=int))
        return tuple(sorted(names))

    def encode(
        self,
        examples: Sequence[Labelled],
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str],
        max_length: int,
        on_disk: bool = False,
    ) -> Encoded:
        """Return tokens and numbers of classes.

        Raises:
            EvaError: a label is none of the classes.
        """
        numbers = {name: number for number, name in enumerate(labels)}

        def target(label: str) -> int:
            if label not in numbers:
                raise EvaError(
                    f"label {label!r} is no class of the training data{near_misses(label, labels)}; they are "
                    f"{', '.join(labels)}; name all of them with data.classes."
                )
            return numbers[label]

        return encode_texts(examples, tokenizer, target=target, max_length=max_length, on_disk=on_disk)

    def blank(self, size: int, length: int) -> dict[str, Tensor]:
        """Return numbers of classes."""
        return {"labels": torch.zeros(size, dtype=torch.long)}

    def outputs(self, output: Any) -> Tensor:
        """Return the logits."""
        return output.logits

    def metrics(self, labels: Sequence[str]) -> Mapping[str, Metric]:
        """Return the metrics; the F1 score is that of the second of two classes, else a mean."""
        return METRICS | (F1 if len(labels) == 2 else MACRO_F1)

    def outcomes(
        self, outputs: Sequence[Tensor], encoded: Encoded, examples: Sequence[Labelled], labels: Sequence[str]
    ) -> Outcomes:
        """Return `right`, `nll`, and the numbers of the classes `expected` and `predicted` of each text."""
        logits, expected = torch.stack(list(outputs)), torch.tensor([row["labels"] for row in encoded.rows])
        predicted = logits.argmax(dim=-1)
        columns = {
            "right": predicted == expected,
            "nll": torch.nn.functional.cross_entropy(logits, expected, reduction="none"),
            "expected": expected,
            "predicted": predicted,
        }
        return Outcomes(
            columns={name: values.double().tolist() for name, values in columns.items()},
            told=[
                {"question": SEPARATOR.join(one.texts), "expected": one.label, "given": labels[given]}
                | {"right": labels[given] == one.label}
                for one, given in zip(examples, predicted.tolist(), strict=True)
            ],
        )

    def learned(self, row: dict[str, Any], labels: Sequence[str]) -> str:
        """Return the name of the class, and its number."""
        return f"{labels[row['labels']]} (class {row['labels']})"

    def facts(self, examples: Sequence[Labelled], labels: Sequence[str]) -> dict[str, Any]:
        """Return how many texts each class has."""
        sizes = Counter(example.label for example in examples)
        return {"classes": {name: sizes[name] for name in labels}}

    def about(self, labels: Sequence[str]) -> str:
        """Return how many classes there are."""
        return f"{len(labels)} classes"
