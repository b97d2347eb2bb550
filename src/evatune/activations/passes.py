"""`Passes`: take one batch after the other and pass it through the model, step by step or as an iterator.

A batch with padding may need several passes, until it is known which rows are padding
(`evatune.activations.padding`). All of them see the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from evatune.activations.capture import Capture
from evatune.activations.padding import Prints
from evatune.activations.positions import BatchPositions
from evatune.activations.preserve import random_state
from evatune.activations.run import Run
from evatune.activations.variants import lengthened, perturbed, ragged, shortened, without_padding

Forward = Callable[[], Any]
Pass = Callable[[], None]


class Passes:
    """Passes of batches through a model, in which the inputs of its targets are measured.

    Iterating passes one batch at each step and yields how many there were so far. Where every pass needs all processes,
    `load`, `run` and `idle` are called one by one instead.

    Args:
        batches: iterated once.
        prepare: returns the call of the model with a batch.
        read: returns which positions of a batch count.
        capture: the hooks.
        run: takes the rows.
        takes: whether the model takes an entry of this name.
        reserved: token numbers with a special meaning for the model.

    Attributes:
        n_passed: how many batches were passed.
        loaded: whether there is a batch that was not passed yet.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        prepare: Callable[[Any], Forward],
        read: Callable[[Any], BatchPositions],
        capture: Capture,
        run: Run,
        takes: Callable[[str], bool] = lambda name: False,
        reserved: frozenset[int] = frozenset(),
    ) -> None:
        self._batches = batches
        self._iterator: Iterator[Any] | None = None
        self._prepare = prepare
        self._read = read
        self._capture = capture
        self._run = run
        self._rows = run.rows
        self._takes = takes
        self._reserved = reserved
        self._forward: Forward | None = None
        self._to_come: Iterator[Pass] = iter(())
        self._next: Pass | None = None
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
        """Whether a pass that other processes take part in has ended early."""
        return self._capture.broken

    def load(self) -> bool:
        """Take the next batch; return False if there is none."""
        if self._iterator is None:
            self._iterator = iter(self._batches)
        try:
            batch = next(self._iterator)
        except StopIteration:
            return False
        self._run.begin_batch()
        self._forward = self._prepare(batch)
        self._as_at_first = random_state()
        self._to_come = self._passes_of(batch)
        self._next = next(self._to_come, None)
        self.loaded = True
        return True

    def run(self) -> bool:
        """Make one pass with the batch that was loaded; return False if the batch needs more passes."""
        assert self.loaded
        if self._next is not None:
            self._as_at_first()
            self._next()
            self._next = next(self._to_come, None)
        if self._next is not None:
            return False
        self._run.end_batch(self._capture.shared.input_of)
        self.n_passed += 1
        self.loaded = False
        return True

    def idle(self) -> None:
        """Repeat the last batch without measuring, because the pass of the other processes needs this process."""
        assert self._forward is not None
        self._capture.watch(self._forward, lambda name, number, entering: None)

    # -- the passes of one batch: what comes next depends on what the passes before have shown ------------------------

    def _passes_of(self, batch: Any) -> Iterator[Pass]:
        positions, rows = self._read(batch), self._rows
        parts = None if self._capture.unbroken or not positions.has_padding else without_padding(batch, positions)
        rows.begin_batch(positions)
        self._capture.shared.begin_batch()
        if rows.is_irregular and parts is not None:
            yield from self._in_parts(parts)
            return
        if not positions.all_count and not rows.has_learned:
            yield from self._probe(batch, positions)
        assert self._forward is not None
        while True:
            yield from self._measured(self._forward)
            if rows.end_pass():
                continue
            if not rows.open:
                return
            if rows.may_learn and not rows.lengths_are_probed and not self._capture.unbroken:
                yield partial(self._probe_lengths, batch, positions)
            elif rows.may_learn and not rows.is_probed:
                yield from self._probe(batch, positions)
            elif parts is not None and not any(map(self._capture.shared.has_taken, rows.open)):
                yield from self._in_parts(parts, only=rows.open)
                return
            else:
                rows.take_all(set(rows.open))

    def _measured(self, forward: Forward) -> Iterator[Pass]:
        """Make passes until one is complete."""
        whole = False

        def once() -> None:
            nonlocal whole
            self._rows.begin_pass()
            whole = self._capture.run(forward)

        while not whole:
            yield once

    def _in_parts(self, parts: Iterable[Any], only: Iterable[str] | None = None) -> Iterator[Pass]:
        """Measure a batch in parts without padding."""
        only = None if only is None else frozenset(only)
        for part in parts:
            self._rows.begin_batch(self._read(part), parted=True)
            self._capture.shared.begin_batch(only)
            yield from self._measured(self._prepare(part))

    def _probe(self, batch: Any, positions: BatchPositions) -> Iterator[Pass]:
        """Pass the batch with other values at its padding; a batch without padding first gets some at its end."""
        shown, plain, changed = positions, Prints(), Prints()
        if not positions.can_be_perturbed:
            self._rows.show_perturbed(changed)
            return
        if not positions.has_padding:
            batch, shown = ragged(batch, positions, takes=self._takes)
            yield partial(self._watch, batch, plain)
        yield partial(self._watch, perturbed(batch, shown, reserved=self._reserved), changed)
        if shown is positions:
            self._rows.show_perturbed(changed)
        else:
            self._rows.show_perturbed(changed, plain=plain, shown=shown)

    def _probe_lengths(self, batch: Any, positions: BatchPositions) -> None:
        """Pass the batch with longer sequences, or with shorter ones if the model does not take longer ones."""
        for resized in (lengthened, shortened):
            longer = Prints()
            try:
                other, more = resized(batch, positions)
                self._watch(other, longer)
            except Exception:  # a model can fail in any way on a length that it does not take
                continue
            self._rows.show_lengths(longer, more)
            return
        self._rows.show_lengths(Prints(), None)

    def _watch(self, batch: Any, prints: Prints) -> None:
        self._as_at_first()
        self._capture.watch(self._prepare(batch), prints.watcher(self._capture.targets))
