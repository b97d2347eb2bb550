"""`Run`: one measuring run, with one `InputState` for each input of its targets.

Shapes: d features, k components.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from evatune.activations.input_state import InputState
from evatune.activations.layer_type import Rows, TargetModule
from evatune.activations.padding import CountedRows
from evatune.activations.stopping import Finding, begin, decide, find, is_check, is_compared, weigh
from evatune.errors import EvaError
from evatune.pca import AnyPCA, StreamingPCA, groups_of, make_room, settle_all, snapshot_all
from evatune.pca.threads import on_one_thread_each
from evatune.pca.together import Task
from evatune.settings import Reason, Stopping

T = TypeVar("T")
R = TypeVar("R")

Needed = Callable[[Mapping[str, str], Mapping[str, InputState]], Mapping[str, int]]
"""A function of the input of each target and of the states of the inputs. It returns how many components of each input
a plan from the present states would use."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a run, or several of them together, have learned."""

    input_of: dict[str, str]
    """Key of the input of every target that was reached."""
    pcas: dict[str, AnyPCA]
    """The PCA of each input, by key."""
    reasons: dict[str, Reason]
    """The stopping rule that an input has met, if any."""
    n_batches: int
    """How many batches were passed."""
    history: list[dict[str, Any]]
    """One entry for each check; see `Spectra.history`."""
    row_counts: dict[str, list[int]]
    """How the rows of each input were counted: the fields of `RowCounts`."""


class Run:
    """One measuring run: takes what enters the targets, and applies the stopping rules.

    Args:
        targets: the targets, in the order of the model.
        new_pca: makes a streaming PCA that keeps the given number of components.
        n_components: how many are kept at most.
        rule: the stopping rules.
        needed: returns how many components of each input the later plan needs, if that is known; the rules then use
            only these.
        state_device: device on which states are kept and rows are multiplied; by default that of the rows.
        checks_per_doubling: how often the rules are applied, see `stopping.is_check`.
        alone: whether the run applies the rules itself. If not, the caller does so with `findings` and `conclude`.

    Attributes:
        inputs: the state of every input by key, the name of one of the targets that receive it.
        rows: tells which rows count.
        history: one entry for each check.
    """

    def __init__(
        self,
        *,
        targets: Sequence[TargetModule],
        new_pca: Callable[[int], StreamingPCA],
        n_components: int,
        rule: Stopping,
        needed: Needed | None = None,
        state_device: torch.device | None = None,
        checks_per_doubling: int = 2,
        alone: bool = True,
    ) -> None:
        self.inputs: dict[str, InputState] = {}
        self.rows = CountedRows()
        self.history: list[dict[str, Any]] = []
        self._targets = {target.name: target for target in targets}
        self._new_pca = new_pca
        self._n_components = n_components
        self._rule = rule
        self._needed = needed
        self._state_device = state_device
        self._per_doubling = checks_per_doubling
        self._alone = alone
        self._input_of: dict[str, str] = {}
        self._n_batches = 0
        self._started = time.perf_counter()

    # -- taking rows --------------------------------------------------------------------------------------------------

    def begin_batch(self) -> None:
        """Prepare for the next batch."""
        if self._rule.has_rule and is_check(self._n_batches + 1, per_doubling=self._per_doubling):
            for group in self._groups():
                compared = [state for state in group if is_compared(state, self._rule)]
                snapshot_all(state.pca for state in compared)
                for state in compared:
                    state.before = state.pca.snapshot()

    def take(self, key: str, number: int, entering: Any) -> bool:
        """Take what enters a target in the call of this number; return False if it is unknown which rows count."""
        target = self._targets[key]
        try:
            masks = self.rows.masks(key, number, target.layer.activations(target.module, entering))
        except EvaError as error:
            raise EvaError(f"target {key!r} {error}") from None
        if masks is None:
            return False
        pieces = target.layer.rows(target.module, entering, masks)
        while True:
            try:
                rows = next(pieces, None)
            except EvaError as error:
                raise EvaError(f"target {key!r} {error}") from None
            if rows is None:
                break
            if self._state_device is not None:
                rows = _moved(rows, self._state_device)
            if key not in self.inputs:
                pca = target.layer.new_pca(target.module, self._n_components, self._new_pca)
                self.inputs[key] = InputState(pca=pca)
            try:
                self.inputs[key].pca.add(rows)
            except EvaError as error:
                raise EvaError(f"the input of {key!r} in batch {self._n_batches + 1}: {error}") from None
        return True

    def look(self, key: str, number: int, entering: Any) -> None:
        """Look at what enters a target while it is unknown which of its rows count."""
        target = self._targets[key]
        self.rows.look_at(key, number, target.layer.activations(target.module, entering))

    def split(self, key: str, new: str) -> None:
        """Begin a new input with all that is known about the input it was split from."""
        self.rows.split(key, new)
        if key in self.inputs:
            self.inputs[new] = copy.deepcopy(self.inputs[key])

    def end_batch(self, input_of: Mapping[str, str]) -> None:
        """Count the batch, and apply the stopping rules where it is time to.

        Args:
            input_of: key of the input of every target that was reached so far.
        """
        self._input_of = dict(input_of)
        self._n_batches += 1
        if self._alone and is_check(self._n_batches, per_doubling=self._per_doubling):
            self.conclude(self.findings())
        elif any(state.pca.works(Task.SETTLE) for state in self._fitted()):
            for group in self._groups():
                settle_all(state.pca for state in group)

    # -- checks -------------------------------------------------------------------------------------------------------

    def findings(self) -> dict[str, Finding]:
        """Settle all inputs, and return what the stopping rules need to know about every one that is not done."""
        for group in self._groups():
            settle_all(state.pca for state in group)
            watched = [state for state in group if self._rule.has_rule and state.reason is None]
            snapshot_all(state.pca for state in watched)
            _each(partial(weigh, rule=self._rule, per_doubling=self._per_doubling), watched, watched)
        if not self._rule.has_rule:
            return {}
        undone = {key: state for key, state in self.inputs.items() if state.pca.is_fitted and state.reason is None}
        needed = self._needed(self._input_of, self.inputs) if self._needed is not None else {}

        def found(key: str) -> Finding:
            return find(undone[key], self._rule, n_needed=needed.get(key, self._n_components))

        return dict(zip(undone, _each(found, list(undone), undone.values()), strict=True))

    def conclude(self, findings: Mapping[str, Finding]) -> None:
        """Apply the rules to findings, of this process or of several together, and prepare for the next check."""
        states = {key: self.inputs[key] for key in findings}
        decide(states, findings, self._rule)
        again = partial(begin, rule=self._rule, per_doubling=self._per_doubling)
        _each(again, list(states.values()), states.values())
        self._note()

    def _note(self) -> None:
        gains = [state.gain for state in self.inputs.values() if state.gain is not None]
        self.history.append(
            {
                "batch": self._n_batches,
                "rows": self._most_rows(),
                "done": self._n_done(),
                "inputs": len(self.inputs),
                "mean_gain": sum(gains) / len(gains) if gains else None,
                "seconds": time.perf_counter() - self._started,
            }
        )

    @property
    def is_done(self) -> bool:
        """Whether every input has met a rule."""
        return bool(self.inputs) and self._n_done() == len(self.inputs)

    def progress_text(self) -> str:
        """Return what the bar shows beside the batches and the time left."""
        return f"{self._n_done()}/{len(self.inputs)} inputs converged, {self._most_rows():,} rows"

    # -- results ------------------------------------------------------------------------------------------------------

    def learned(self) -> Learned:
        """Return what the run has learned so far."""
        return Learned(
            input_of=dict(self._input_of),
            pcas={key: state.pca for key, state in self.inputs.items()},
            reasons={key: state.reason for key, state in self.inputs.items() if state.reason is not None},
            n_batches=self._n_batches,
            history=list(self.history),
            row_counts={key: list(astuple(counts)) for key, counts in self.rows.counts.items()},
        )

    def _groups(self) -> Iterator[list[InputState]]:
        """Yield the inputs with rows in the groups of `groups_of`, each of which is released before the next."""
        fitted = self._fitted()
        pcas = [state.pca for state in fitted]
        for group in groups_of(pcas):
            yield fitted[group]
            make_room(pcas)

    def _fitted(self) -> list[InputState]:
        return [state for state in self.inputs.values() if state.pca.is_fitted]

    def _n_done(self) -> int:
        return sum(state.reason is not None for state in self.inputs.values())

    def _most_rows(self) -> int:
        return max((state.pca.n_samples_seen_ for state in self._fitted()), default=0)


def _each(function: Callable[[T], R], items: Sequence[T], states: Iterable[InputState]) -> list[R]:
    """Return what a function of one input gives for each, on a CPU side by side on one thread each."""
    on_processor = all(state.pca.snapshot().components.device.type == "cpu" for state in states)
    return on_one_thread_each(function, items) if on_processor else [function(item) for item in items]


def _moved(rows: Rows, device: torch.device) -> Rows:
    """Return rows, in the form that a layer type returns, on a device."""
    return rows.to(device) if isinstance(rows, Tensor) else [part.to(device) for part in rows]
