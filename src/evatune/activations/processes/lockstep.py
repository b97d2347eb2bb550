"""Measuring in several processes: each passes its own batches, and they exchange their PCA states once, at the end.

Every process feeds its rows to its own `StreamingPCA`. After 1, 2, 4, 8, … batches the processes meet: they synchronize
and apply the stopping rules. Each has compared its own components on its own rows; for every input that is not done,
they exchange four numbers. When all inputs are done in all processes, they exchange their states: about d x l numbers
per input and process, whatever the number of rows n is. Gathering activations would send n x d numbers. Every process
merges the same states in the same order, so all get the same bits on equal hardware.

A process that has no more data, or never had any, keeps taking part. A process that fails reports this at the next
meeting, and then all end with an error: none waits for a process that has ended.

If a pass itself needs all processes (`sharded_models.py`), they meet before each pass, and each reports whether it has
a batch, has failed or was interrupted. A process without a new batch repeats its last one and measures nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evatune.activations.passes import Passes
from evatune.activations.processes.exchange import Processes, layout_of
from evatune.activations.run import Learned, Run
from evatune.activations.stopping import Finding, is_check, read_together
from evatune.errors import EvaError
from evatune.pca import AnyPCA, from_state
from evatune.settings import Reason


class _Facts(NamedTuple):
    """What a process tells all others at each meeting."""

    running: int
    """Whether it has or may have another batch."""
    failed: int
    interrupted: int
    n_passed: int
    can_pass: int
    """Whether it has any batch, a new one or one that was passed before."""


class _Member:
    """This process: the actions between meetings, and what it has to tell the others about them."""

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

        If a pass that needs all processes has ended early, there is no next meeting: the error is raised at once.
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
        """Take the next batch and pass it, without the other processes."""
        self.load()
        while self.passes.loaded:
            self.passes.run()


def measure_in_lockstep(
    passes: Passes,
    run: Run,
    processes: Processes,
    *,
    max_batches: int,
    bar: Any,
    together: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[Learned, Reason]:
    """Walk through the batches of this process in lockstep with the others, and merge what all have learned.

    Args:
        passes: of this process.
        run: of this process.
        processes: all of them.
        max_batches: the most batches that one process passes.
        bar: the progress bar.
        together: whether each pass needs all processes.
        interrupted: returns whether Ctrl-C was pressed, which does not raise by itself.

    Returns:
        What all have learned together, the same in every process, and why measuring ended.

    Raises:
        EvaError: another process has failed. An error of this process itself is raised as it is.
    """
    member = _Member(passes, max_batches=max_batches)
    n_steps, n_met = 0, 0
    while True:
        if together and member.running:
            member.attempt(member.load)
        if interrupted():
            member.interrupted = True
            member.running &= together
        if together or is_check(n_steps, per_doubling=1) or n_steps >= max_batches:
            everyone = [_Facts(*numbers) for numbers in processes.gather_numbers(*member.facts())]
            _raise_failure(member.failure, [facts.failed for facts in everyone])
            if together:
                n_steps = max(facts.n_passed for facts in everyone)
            all_done = False
            is_interrupted = any(facts.interrupted for facts in everyone)
            if is_check(n_steps, per_doubling=1) and n_steps > n_met and not is_interrupted:
                n_met = n_steps
                _check(run, processes)
                all_done = all(is_done for (is_done,) in processes.gather_numbers(run.is_done))
            if is_interrupted and not any(facts.n_passed for facts in everyone):
                raise KeyboardInterrupt
            stopped = _reason(everyone, is_full=n_steps >= max_batches or all_done)
            if stopped is not None:
                return _exchange(run.learned(), processes), stopped
            if together:
                _check_all_can_pass(everyone)
        if together:
            member.attempt(passes.run if passes.loaded else passes.idle)
        elif member.running:
            member.attempt(member.walk)
        n_steps += 1
        bar.update(passes.n_passed - bar.n)
        bar.set_postfix_str(run.progress_text())


def _raise_failure(failure: Exception | None, failed: Sequence[int]) -> None:
    if failure is not None:
        raise failure
    if any(failed):
        number = next(number for number, has_failed in enumerate(failed) if has_failed)
        raise EvaError(f"process {number} failed while measuring, so all end; its own message says why.")


def _reason(everyone: Sequence[_Facts], *, is_full: bool) -> Reason | None:
    """Return why measuring ends here, if it does; `is_full` says that enough batches have passed."""
    if any(facts.interrupted for facts in everyone):
        return Reason.INTERRUPTED
    if is_full:
        return Reason.BATCH_CAP
    return None if any(facts.running for facts in everyone) else Reason.EXHAUSTED


def _check_all_can_pass(everyone: Sequence[_Facts]) -> None:
    lacking = [number for number, facts in enumerate(everyone) if not facts.can_pass]
    if lacking:
        raise EvaError(
            f"process {lacking[0]} has no batch, but every pass of a sharded model needs all processes; give each of "
            "them at least one batch."
        )


def _check(run: Run, processes: Processes) -> None:
    """Apply the stopping rules to what all processes have found on their own rows."""
    found: dict[str, Finding] = {}
    failure: Exception | None = None
    try:
        found = run.findings()
    except Exception as error:  # the others are told, since they wait for the findings of this process
        failure = error
    told = processes.gather_json([failure is not None, _numbers(found)])
    _raise_failure(failure, [failed for failed, _ in told])
    run.conclude({key: _together([numbers[key] for _, numbers in told if key in numbers]) for key in found})


def _numbers(found: Mapping[str, Finding]) -> dict[str, list[Any]]:
    """Return what others are told about each input: share, energies, rows since the last check and before."""
    shares = read_together({key: one.share for key, one in found.items() if one.share is not None})
    energies = read_together({key: one.energies_2 for key, one in found.items() if one.energies_2 is not None})
    return {key: [shares.get(key), energies.get(key), one.n_rows, one.n_rows_before] for key, one in found.items()}


def _together(told: Sequence[list[Any]]) -> Finding:
    """Return what several processes have found of an input: the least share, and the sum of all rows' energies."""
    shares = [share for share, _, _, _ in told if share is not None]
    scored = [numbers for numbers in told if numbers[1] is not None]
    energies = torch.tensor([energies for _, energies, _, _ in scored], dtype=torch.float64)
    return Finding(
        share=torch.tensor(min(shares), dtype=torch.float64) if shares else None,
        energies_2=energies.sum(dim=0) if scored else None,
        n_rows=sum(n_rows for _, _, n_rows, _ in scored),
        n_rows_before=sum(n_rows_before for _, _, _, n_rows_before in scored),
        n_processes=max(len(scored), 1),
    )


def _exchange(own: Learned, processes: Processes) -> Learned:
    """Return what all processes have learned together, the same in each."""
    input_of = agreed_inputs(processes.gather_json(own.input_of))
    # The key that this process has for each of these inputs. Targets that share an input here may be split elsewhere;
    # then both of their inputs have the same key here.
    names = {key: own.input_of[key] for key in dict.fromkeys(input_of.values()) if key in own.input_of}
    own = replace(
        own,
        input_of={name: input_of[name] for name in own.input_of},
        pcas={key: own.pcas[name] for key, name in names.items() if name in own.pcas},
        reasons={key: own.reasons[name] for key, name in names.items() if name in own.reasons},
        row_counts={key: own.row_counts[name] for key, name in names.items() if name in own.row_counts},
    )
    states: dict[str, dict[str, Tensor]] = {}
    failure: Exception | None = None
    try:
        states = {key: pca.condensed().state_dict() for key, pca in own.pcas.items() if pca.is_fitted}
    except Exception as error:  # NaN or no memory: the others are told, since they wait for the states
        failure = error
    told = processes.gather_json([failure is not None, layout_of(states), replace(own, pcas={}).__dict__])
    _raise_failure(failure, [failed for failed, _, _ in told])
    everyone = [Learned(**learned) for _, _, learned in told]
    received = processes.gather_states(states, [layout for _, layout, _ in told])
    pcas = {key: _merged(found) for key, found in received}
    return Learned(
        input_of=input_of,
        pcas={key: pcas[key] for key in dict.fromkeys(input_of.values()) if key in pcas},
        reasons=_common_reasons(everyone),
        n_batches=sum(learned.n_batches for learned in everyone),
        history=everyone[0].history,
        row_counts=_summed(learned.row_counts for learned in everyone),
    )


def _summed(tables: Iterable[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    total: dict[str, list[int]] = {}
    for table in tables:
        for key, counts in table.items():
            total[key] = [a + b for a, b in zip(total.get(key, [0] * len(counts)), counts, strict=True)]
    return total


def _common_reasons(everyone: Sequence[Learned]) -> dict[str, Reason]:
    """Return why inputs are done: an input must be done in every process that reached it; the first reason counts."""
    reasons: dict[str, Reason] = {}
    for key in dict.fromkeys(key for learned in everyone for key in learned.input_of.values()):
        found = [learned.reasons.get(key) for learned in everyone if key in learned.input_of.values()]
        if found[0] is not None and None not in found:
            reasons[key] = Reason(found[0])
    return reasons


def _merged(states: Sequence[dict[str, Tensor]]) -> AnyPCA:
    return functools.reduce(lambda first, second: first.merge(second), map(from_state, states))


def agreed_inputs(tables: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return which target has which input, over all processes: targets must share an input in every process.

    Args:
        tables: for each process, the key of the input of every target that it has reached.

    Returns:
        For every target that any process has reached, the first target with the same input.
    """
    agreed: dict[str, str] = {}
    first_of: dict[tuple[str | None, ...], str] = {}
    for name in dict.fromkeys(name for table in tables for name in table):
        agreed[name] = first_of.setdefault(tuple(table.get(name) for table in tables), name)
    return agreed
