"""The protocol of a domain: all that training, evaluation and the command line use of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from evatune.tasks.scores import Scores

if TYPE_CHECKING:
    from pathlib import Path

    from evatune.tasks.outline import Outline


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a task needs of the adapter and of the training."""

    task_type: str | None = None
    """PEFT's task type, which a saved adapter names; None where PEFT has none for it."""
    heads: tuple[str, ...] = ()
    """New modules: all their weights are trained and saved, they are not measured and have no adapter."""
    without_adapter: tuple[str, ...] = ()
    """Further modules that stay frozen and without an adapter."""
    row_mask: Callable[[Any], Tensor] | None = None
    """Returns which positions of a batch are measured, (B, T); None uses the batch's own masks."""
    learned_mask: Callable[[Any], Tensor] | None = None
    """The same with `measure.use_label_mask`, where `row_mask` is given; None for tasks without such positions."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of transformers' `TrainingArguments` that differ from what `training/` gives."""
    counts_tokens: bool = False
    """Whether the model divides its loss by the tokens of all batches and processes of a step, which the Trainer
    counts; the loss of other models is a mean over their own batch."""


LEARNED = ("⟦", "⟧")
"""What stands around the learned parts of a preview."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Examples exactly as the model sees them."""

    text: str
    """For a terminal; what is learned is marked."""
    content: list[dict[str, Any]]
    """The same as plain values, one mapping an example."""
    picture: bytes | None = None
    """A PNG file, where the examples are pictures."""
    without_picture: str = ""
    """Why there is none, where they are pictures otherwise."""


class Task(Protocol):
    """One domain with its data and its model; data are read and weights are loaded at the first access.

    The caller reads `train` and `held_out` before it loads the model, so that an error in the data is raised
    early, and sets the seed before `load_model`, which may make new heads.
    """

    @property
    def train(self) -> Any:
        """The training examples: a data set with `len` and integer keys, in an order that depends only on the seed."""

    @property
    def held_out(self) -> Sized:
        """What `evaluate` scores the model on: examples, episodes, ...; empty if the recipe names none."""

    def kinds(self) -> Sequence[str]:
        """Return the kind of each training example (its task, its class, its environment), for stratified batches."""

    def outline(self) -> Outline:
        """Return what is known without weights and without a hub; data on this machine are read."""

    def load_model(self) -> Any:
        """Return the base model: a `torch.nn.Module` whose `forward(**batch)` returns an output with `.loss`."""

    def needs(self, model: Any) -> Needs:
        """Return what this model needs; it is the base model, without adapter."""

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return a batch of training examples."""

    def evaluate(self, model: Any, *, limit: int | None = None, bf16: bool = False, progress: bool = True) -> Scores:
        """Score a model, with or without adapter, on the first `limit` of `held_out`; its mode is restored."""

    def preview(self, n: int) -> Preview:
        """Return the first `n` training examples, or held-out ones if there are no others."""

    def summary(self) -> str:
        """Return one line on the training data for the console: how many, from where, what was dropped or cut."""

    def facts(self) -> dict[str, Any]:
        """Return the same as plain values for the record, with the number of held-out examples."""

    def save_processor(self, folder: Path) -> None:
        """Save the preprocessor (tokenizer, image processor, ...) beside a saved model."""

    def check_saved(self, folder: Path) -> None:
        """Check that what `save_processor` wrote into a folder, if anything, fits these data.

        Raises:
            EvaError: a model that was saved there tells other classes apart.
        """


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards each of its modules has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def batches(
    task: Task,
    *,
    batch_size: int,
    seed: int | None = None,
    sampling: Literal["random", "stratified"] = "random",
    part: tuple[int, int] = (0, 1),
) -> DataLoader[Any]:
    """Return a loader of batches of the training examples.

    Args:
        task: the task.
        batch_size: examples in a batch; the last may be smaller.
        seed: shuffles the examples, the same way in every pass; None keeps their order.
        sampling: `stratified` takes one example of each kind in turn, until a kind has no more.
        part: (k, p) takes every p-th batch, from batch k on: the share of process k of p.
    """
    order = list(range(len(task.train)))
    if seed is not None:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    if sampling == "stratified":
        order = _in_turn(order, task.kinds())
    first, step = part
    order = [index for place, index in enumerate(order) if place // batch_size % step == first]
    return DataLoader(task.train, batch_size=batch_size, sampler=order, collate_fn=task.collate)


def _in_turn(order: Sequence[int], kinds: Sequence[str]) -> list[int]:
    """Return an order in which the kinds take turns; each keeps the given order among its own."""
    turns: Counter[str] = Counter()
    keys = []
    for place, index in enumerate(order):
        keys.append((turns[kinds[index]], place, index))
        turns[kinds[index]] += 1
    return [index for _, _, index in sorted(keys)]
