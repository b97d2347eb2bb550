"""Measuring in many processes: each passes its own batches, and only small matrices are exchanged.

Every process follows its rows with its own `StreamingPCA`. After 1, 2, 4, 8, … steps they meet to check whether to go
on, for which the leading components of inputs that are not done suffice (`AnyPCA.leading`), and at the end
they exchange whole states: some d x l numbers per input and process, whatever the number of rows, where gathering
activations would send n x d. Every process merges the same states in the same order, so that all end with the same bits
on equal hardware.

Processes walk in lockstep from meeting to meeting. One that has run out of data, or never had any, keeps taking part;
one that fails says so at the next meeting, and then all end with an error: none waits for a process that is gone.

Where a pass itself needs all processes (`sharded_models.py`), they walk in lockstep from pass to pass: each
says before a pass whether it has a batch, has failed or was interrupted. One without a batch repeats its last one, or
one that another lends it, and measures nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from evatune.activations.passes import Passes
from evatune.activations.processes.exchange import Ranks, layout_of
from evatune.activations.run import Measurement
from evatune.activations.stopping import BATCH_CAP, EXHAUSTED, INTERRUPTED
from evatune.errors import EvaError
from evatune.pca import AnyPCA, from_state


class _Facts(NamedTuple):
    """What a process tells all others where they meet."""

    running: int
    """Whether it has or may have another batch."""
    failed: int
    interrupted: int
    n_passed: int
    can_pass: int
    """Whether it has any batch, be it one passed before."""


class _Member:
    """This process among the others: what it does, and what came of it."""

    def __init__(self, passes: Passes, *, max_batches: int) -> None:
        self.passes = passes
        self.max_batches = max_batches
        self.running = True
        self.interrupted = False
        self.failure: Exception | None = None

    def facts(self) -> _Facts:
        """Return what to tell the others."""
        return _Facts(
            running=self.running,
            failed=self.failure is not None,
            interrupted=self.interrupted,
            n_passed=self.passes.n_passed,
            can_pass=self.passes.can_idle,
        )

    def attempt(self, action: Callable[[], Any]) -> None:
        """Do something that may fail or be interrupted, and remember that for the next meeting.

        Where a pass that others are in has ended in the middle, there is no next meeting, and this process ends.
        """
        try:
            action()
        except KeyboardInterrupt:
            if self.passes.broken:
                raise
            self.running, self.interrupted = False, True
        except Exception as error:
            if self.passes.broken:
                raise
            self.running, self.failure = False, error

    def load(self) -> None:
        """Take the next batch, if there is none waiting."""
        if not self.passes.loaded:
            self.running = self.passes.n_passed < self.max_batches and self.passes.load()

    def walk(self) -> None:
        """Take and pass the next batch, on one's own."""
        self.load()
        while self.passes.loaded:
            self.passes.run()


def drive(
    passes: Passes,
    measurement: Measurement,
    ranks: Ranks,
    *,
    max_batches: int,
    bar: Any,
    together: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[int, str]:
    """Walk through the batches of this process in lockstep with the others, merging and checking where they meet.

    Args:
        passes: of this process.
        measurement: of this process; at the end it holds the merged states, the same in every process.
        ranks: the processes.
        max_batches: the most batches that one process passes.
        bar: the progress bar.
        together: whether every single pass needs all processes.
        interrupted: tells whether Ctrl-C was pressed, where it does not interrupt by itself.

    Returns:
        How many batches all processes have passed together, and why measuring ended.

    Raises:
        EvaError: another process has failed. What this process itself raised is raised again.
    """
    member = _Member(passes, max_batches=max_batches)
    assembly = _Assembly(measurement, ranks)
    n_steps, n_met = 0, 0
    while True:
        if together:
            if member.running:
                member.attempt(member.load)
            member.interrupted |= interrupted()
        if together or _is_meeting(n_steps) or n_steps >= max_batches:
            everyone = [_Facts(*numbers) for numbers in ranks.gather_numbers(*member.facts())]
            _raise_failure(member.failure, [facts.failed for facts in everyone])
            n_batches = sum(facts.n_passed for facts in everyone)
            if together:
                n_steps = max(facts.n_passed for facts in everyone)
            stopped = None
            if any(facts.interrupted for facts in everyone):
                stopped = INTERRUPTED
            elif n_steps >= max_batches:
                stopped = BATCH_CAP
            elif not any(facts.running for facts in everyone):
                stopped = EXHAUSTED
            elif _is_meeting(n_steps) and n_steps > n_met:
                stopped = assembly.check(n_batches)
                n_met = n_steps
                bar.set_postfix_str(measurement.progress_text())
            if stopped:
                assembly.conclude(n_batches, checked=n_met == n_steps)
                return n_batches, stopped
            lacking = [rank for rank, facts in enumerate(everyone) if not facts.can_pass]
            if together and lacking:
                lender = next(rank for rank, facts in enumerate(everyone) if facts.running)
                batch = ranks.lend(passes.batch, lender=lender)
                if ranks.rank in lacking:
                    member.attempt(functools.partial(passes.borrow, batch))
                continue  # and hear whether all can make a pass now
        measurement.pcas = assembly.own
        if together:
            member.attempt(passes.run if passes.loaded else passes.idle)
        elif member.running:
            member.attempt(member.walk)
        n_steps += 1
        bar.update(passes.n_passed - bar.n)


def _is_meeting(n_steps: int) -> bool:
    """Tell whether processes meet after so many steps: 1, 2, 4, 8, …"""
    return n_steps > 0 and n_steps & (n_steps - 1) == 0


def _raise_failure(failure: Exception | None, failed: Sequence[int]) -> None:
    if failure is not None:
        raise failure
    if any(failed):
        rank = next(rank for rank, has_failed in enumerate(failed) if has_failed)
        raise EvaError(f"process {rank} failed while measuring, so all end; its own message says why.")


class _Assembly:
    """What all processes have measured together, as of the last meeting.

    Attributes:
        own: what this process has measured.
    """

    def __init__(self, measurement: Measurement, ranks: Ranks) -> None:
        self.own = measurement.pcas
        self._measurement = measurement
        self._ranks = ranks
        self._merged: dict[str, AnyPCA] = {}

    def check(self, n_batches: int) -> str | None:
        """Exchange what the stopping rules need, after so many batches of all; returns why to end here, if so."""
        monitor = self._measurement.monitor
        if not monitor.rule.has_rule:
            return None  # nothing would be done with it
        self._measurement.pool(self.own, self._ranks.add)
        undone = {key: pca for key, pca in self.own.items() if key not in monitor.done}
        table, merged = self._merge(undone, lambda pca: pca.leading())
        self._merged |= merged
        self._adopt(table, n_batches)
        return BATCH_CAP if self._measurement.all_done() else None

    def conclude(self, n_batches: int, *, checked: bool) -> None:
        """Exchange everything; with a last check, if there was none after this step."""
        table, self._merged = self._merge(self.own, lambda pca: pca.condensed())
        if not checked:
            self._measurement.pool(self.own, self._ranks.add)
            self._adopt(table, n_batches)
        absent = [self._measurement.targets[key] for key in dict.fromkeys(table.values()) if key not in self._merged]
        for target in absent:  # all its rows are masked, everywhere
            new_pca, n_components = self._measurement.new_pca, self._measurement.n_components
            self._merged[target.name] = target.layer.new_pca(target.module, n_components, new_pca)
        self._measurement.input_of, self._measurement.pcas = table, self._merged

    def _adopt(self, table: Mapping[str, str], n_batches: int) -> None:
        reached = {name: key for name, key in table.items() if key in self._merged}
        self._measurement.adopt(reached, dict(self._merged), self.own, n_batches=n_batches)

    def _merge(
        self, local: Mapping[str, AnyPCA], sent_of: Callable[[AnyPCA], AnyPCA]
    ) -> tuple[dict[str, str], dict[str, AnyPCA]]:
        """Return the table of inputs and the merged state of each, the same in all processes."""
        states: dict[str, dict[str, Tensor]] = {}
        failure: Exception | None = None
        try:
            states = {key: sent_of(pca).state_dict() for key, pca in local.items() if pca.is_fitted}
        except Exception as error:  # not a number, or no memory: told to the others, who would wait for the states
            failure = error
        told = self._ranks.gather_json([failure is not None, dict(self._measurement.input_of), layout_of(states)])
        _raise_failure(failure, [failed for failed, _, _ in told])
        layouts = [layout for _, _, layout in told]
        merged = {key: _merged(found) for key, found in self._ranks.gather_states(states, layouts)}
        table = _agreed([inputs for _, inputs, _ in told])
        return table, {key: merged[key] for key in dict.fromkeys(table.values()) if key in merged}


def _merged(states: Sequence[dict[str, Tensor]]) -> AnyPCA:
    return functools.reduce(lambda first, second: first.merge(second), map(from_state, states))


def _agreed(tables: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return which target has which input, as the processes that reached it found."""
    agreed: dict[str, str] = {}
    for table in tables:
        for name, key in table.items():
            if agreed.setdefault(name, key) != key:
                raise EvaError(
                    f"the processes disagree on which targets share the input of {name!r}; give all the same model."
                )
    return agreed
