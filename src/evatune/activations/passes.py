"""`Passes`: take one batch after the other and pass it through the model, step by step or as an iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from evatune.activations.capture import Capture
from evatune.activations.preserve import random_state
from evatune.activations.rows import RowMasks
from evatune.activations.run import Run

Forward = Callable[[], Any]


class Passes:
    """Passes of batches through a model, in which the inputs of its targets are measured.

    Iterating passes one batch at each step and yields how many there were. Processes that need each other in every
    pass take `load`, `run` and `idle` apart.

    Args:
        batches: gone through once.
        prepare: returns the call of the model with a batch.
        masks_of: returns which positions of a batch count.
        capture: the hooks.
        run: takes the rows.

    Attributes:
        n_passed: how many batches were passed.
        loaded: whether there is a batch that was not passed yet.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        prepare: Callable[[Any], Forward],
        masks_of: Callable[[Any], RowMasks],
        capture: Capture,
        run: Run,
    ) -> None:
        self._batches = batches
        self._iterator: Iterator[Any] | None = None
        self._prepare = prepare
        self._masks_of = masks_of
        self._capture = capture
        self._run = run
        self._forward: Forward | None = None
        self._as_at_first: Callable[[], None] = lambda: None
        self.n_passed = 0
        self.loaded = False

    def __iter__(self) -> Iterator[int]:
        while self.load():
            while not self.run():
                pass
            yield self.n_passed

    @property
    def can_idle(self) -> bool:
        """Whether there is a batch to repeat."""
        return self._forward is not None

    @property
    def broken(self) -> bool:
        """Whether a pass that other processes take part in has ended in the middle."""
        return self._capture.broken

    def load(self) -> bool:
        """Take the next batch; returns False where there is none."""
        if self._iterator is None:
            self._iterator = iter(self._batches)
        try:
            batch = next(self._iterator)
        except StopIteration:
            return False
        self._run.begin_batch(self._masks_of(batch))
        self._capture.shared.begin_batch()
        self._forward = self._prepare(batch)
        self._as_at_first = random_state()
        self.loaded = True
        return True

    def run(self) -> bool:
        """Pass the batch that was loaded; returns False if the very same batch must be passed once more."""
        assert self._forward is not None and self.loaded
        self._as_at_first()
        if not self._capture.run(self._forward):
            return False
        self._run.end_batch(self._capture.shared.input_of)
        self.n_passed += 1
        self.loaded = False
        return True

    def idle(self) -> None:
        """Repeat the last batch without measuring anything, because other processes need this one in their pass."""
        assert self._forward is not None
        self._capture.watch(self._forward, lambda name, number, entering: None)
