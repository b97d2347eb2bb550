"""Measure a model block by block: all batches pass through one block before the next one is filled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from evatune.activations.batches import forward_arguments, reserved_tokens, takes_entry
from evatune.activations.capture import Capture
from evatune.activations.from_disk.checkpoint import StoredWeights
from evatune.activations.from_disk.outline import HIDDEN, Call, Outline
from evatune.activations.from_disk.waiting import WaitingTensors
from evatune.activations.layer_type import TargetModule
from evatune.activations.padding import Prints
from evatune.activations.positions import BatchPositions
from evatune.activations.results import check_rows, no_batch, spectra_of
from evatune.activations.run import Run
from evatune.activations.sharing import SharedInputs
from evatune.activations.variants import lengthened, perturbed, ragged
from evatune.errors import EvaError
from evatune.fingerprint import sampled_modules, sampled_weights
from evatune.settings import Reason
from evatune.spectra import Spectrum, Target

MEASURED = "measured"
"""Key of the variant of a batch that is measured; the other variants only show which rows are padding."""


@dataclass(frozen=True)
class _Waits:
    """Stands for a tensor that waits under this key."""

    key: tuple[Any, ...]


class BlockwiseRun:
    """One measurement, block by block.

    Args:
        model: a model whose parameters are on the meta device.
        targets: what to measure.
        blocks: its blocks by name, in order.
        weights: fills parts of the model.
        device: where blocks run.
        autocast: returns the context of a forward pass.
        new_run: returns a run that measures the given targets.
        n_components: how many components are kept of each input at most.
        max_batches: how many batches are taken at most.
        read: reads which positions of a batch count.
        forward: calls the model with a batch, or None for the default.

    Attributes:
        reached: names of the targets that got an input.
        table: the targets of which any row counts, by name.
        spectra: the spectrum of every input, by key.
        sampled: a few weights of the targets, see `evatune.fingerprint`.
        n_batches: how many batches there were.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        targets: Sequence[TargetModule],
        blocks: Mapping[str, nn.Module],
        weights: StoredWeights,
        device: torch.device,
        autocast: Callable[[], Any],
        new_run: Callable[..., Run],
        n_components: int,
        max_batches: int,
        read: Callable[[Any], BatchPositions],
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.weights = weights
        self.device = device
        self.autocast = autocast
        self.new_run = new_run
        self.n_components = n_components
        self.max_batches = max_batches
        self.read = read
        self.forward = forward
        self.targets_of: dict[str, list[TargetModule]] = {name: [] for name in blocks}
        self.outside: list[TargetModule] = []
        for target in targets:
            block = next((name for name in blocks if target.name.startswith(name + ".")), None)
            (self.outside if block is None else self.targets_of[block]).append(target)
        self.reached: set[str] = set()
        self.table: dict[str, Target] = {}
        self.spectra: dict[str, Spectrum] = {}
        self.sampled: dict[str, list[float]] = {}
        self.n_batches = 0
        self._to_sample = sampled_modules(target.name for target in targets)
        self._fill_outside = False
        self._forwards: list[dict[str, Callable[[], Any]]] = []
        self._positions: list[BatchPositions] = []
        self._calls: list[dict[str, list[Call]]] = []
        self._probed: int | None = None
        self._shown = BatchPositions()
        self._more: Sequence[int] = ()

    @property
    def stopped(self) -> Reason:
        """Why there were no more batches."""
        return Reason.BATCH_CAP if self.n_batches == self.max_batches else Reason.EXHAUSTED

    def run(self, batches: Iterable[Any], waiting: WaitingTensors, bar: tqdm[Any]) -> None:
        """Measure all targets on all batches.

        Args:
            batches: iterated once, up to `max_batches`.
            waiting: keeps hidden states and arguments between blocks.
            bar: moves by one for each batch in each block.

        Raises:
            EvaError: there is no batch, or too few rows (see `check_rows`), or the model is not one list of blocks.
        """
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(self.device)
        last_measured = [name for name, targets in self.targets_of.items() if targets][-1]
        # Targets outside the blocks may run after them; the first pass shows this.
        outline = Outline(self.model, self.blocks, last=list(self.blocks)[-1] if self.outside else last_measured)
        self._run_before(islice(batches, self.max_batches), outline, waiting, bar)
        behind = [target for target in self.outside if target.name not in self.reached]
        names = list(self.blocks)
        names = names[: names.index(outline.last if behind else last_measured) + 1]
        bar.total = self.n_batches * (1 + len(names))
        output: Any = None
        for position, name in enumerate(names):
            bar.set_description(f"block {position + 1}/{len(names)}")
            last = position + 1 == len(names)
            with self.weights.filled(name):
                output = self._run_block(name, position, waiting, bar, to_the_end=not last or bool(behind))
        if behind:
            self._run_behind(behind, outline, waiting, output)
        self._check_rows()

    def _run_before(
        self,
        batches: Iterable[Any],
        outline: Outline,
        waiting: WaitingTensors,
        bar: tqdm[Any],
    ) -> None:
        """Run what comes before the blocks for every batch."""
        iterator = iter(batches)
        first = next(iterator, None)
        if first is None:
            raise no_batch()
        run = self.new_run(targets=self.outside)
        capture = self._capture(run, self.outside, to_the_end=True)
        with self._filled_on_demand():
            try:
                outline.learn_style(self._forward(first))
            except EvaError:
                # Some models use the weights of a module without calling it. Then all weights must be filled.
                self._fill_outside = True
                self.weights.fill(name for name in self._outside_names() if name in self.weights)
                outline.learn_style(self._forward(first))
            with capture:
                for number, batch in enumerate(chain([first], iterator)):
                    forwards = {name: self._forward(variant) for name, variant in self._variants(number, batch).items()}
                    records = {name: partial(outline.record, forward) for name, forward in forwards.items()}
                    self._calls.append({})
                    for name, (hidden, calls) in self._measure_passes(number, run, capture, records).items():
                        waiting["hidden", number, name] = hidden
                        self._calls[number][name] = _put_away(calls, (number, name), waiting)
                    if self.outside:
                        self._forwards.append(forwards)
                    self.n_batches += 1
                    bar.update()
        self._conclude(run, [target for target in self.outside if target.name in capture.shared.input_of])

    def _run_block(self, name: str, position: int, waiting: WaitingTensors, bar: tqdm[Any], *, to_the_end: bool) -> Any:
        """Run all batches through one block, and return the form of its output."""
        block, targets = self.blocks[name], self.targets_of[name]
        run = self.new_run(targets=targets)
        output: Any = None
        # Entered once a block, since autocast keeps its copies of weights until it is left.
        with self._capture(run, targets, to_the_end=to_the_end) as capture, self.autocast():
            for number, variants in enumerate(self._calls):
                forwards = {}
                for variant, calls in variants.items():
                    call = calls[position]
                    if call.block != name:
                        raise EvaError(
                            f"{type(self.model).__name__} does not call its blocks in the order of its list."
                        )
                    hidden = waiting["hidden", number, variant].to(self.device)
                    args, kwargs = (_fetched(part, hidden, waiting, self.device) for part in (call.args, call.kwargs))
                    forwards[variant] = partial(block, *args, **kwargs)
                results = self._measure_passes(number, run, capture, forwards)
                if to_the_end:
                    output = results[MEASURED]
                    for variant, result in results.items():
                        waiting["hidden", number, variant] = result if isinstance(result, Tensor) else result[0]
                bar.update()
        self._sample()
        self._conclude(run, targets)
        if self.reached:  # too few rows show in the first block, long before the last one has run
            self._check_rows()
        return output

    def _run_behind(
        self,
        targets: Sequence[TargetModule],
        outline: Outline,
        waiting: WaitingTensors,
        output: Any,
    ) -> None:
        """Run what comes after the blocks for every batch."""
        run = self.new_run(targets=targets)
        capture = self._capture(run, targets, to_the_end=False)
        with self._filled_on_demand(), capture:
            for number, variants in enumerate(self._forwards):
                forwards = {}
                for variant in self._calls[number]:
                    hidden = waiting["hidden", number, variant].to(self.device)
                    given = hidden if isinstance(output, Tensor) else (hidden, *(None for _ in output[1:]))
                    forwards[variant] = partial(outline.finish, variants[variant], given)
                self._measure_passes(number, run, capture, forwards)
        self._conclude(run, targets)

    def _capture(self, run: Run, targets: Sequence[TargetModule], *, to_the_end: bool) -> Capture:
        full_precision = torch.autocast(self.device.type, enabled=False)
        shared = SharedInputs(full_precision(run.take), run.split, run.look)
        return Capture(self.model, targets, shared, to_the_end=to_the_end)

    def _variants(self, number: int, batch: Any) -> dict[str, Any]:
        """Return the batch, and for the first one with positions that do not count, variants to compare it with."""
        positions = self.read(batch)
        self._positions.append(positions)
        if positions.all_count or self._probed is not None or not positions.can_be_perturbed:
            return {MEASURED: batch}
        self._probed, self._shown, variants, shown = number, positions, {}, batch
        if not positions.has_padding:
            takes = partial(takes_entry, self.model) if self.forward is None else lambda name: False
            variants["plain"], self._shown = ragged(batch, positions, takes=takes)
            shown = variants["plain"]
        variants["changed"] = perturbed(shown, self._shown, reserved=reserved_tokens(self.model))
        variants["longer"], self._more = lengthened(batch, positions)
        return variants | {MEASURED: batch}

    def _measure_passes(
        self, number: int, run: Run, capture: Capture, forwards: Mapping[str, Callable[[], Any]]
    ) -> dict[str, Any]:
        """Pass a batch and its variants through one part of the model, and return what each gives.

        A variant that the model does not take is left out from then on.
        """
        results: dict[str, Any] = {}
        prints: dict[str, Prints] = {}

        def keep(name: str) -> None:
            results[name] = forwards[name]()

        run.begin_batch()
        run.rows.begin_batch(self._positions[number])
        for name in [name for name in forwards if name != MEASURED]:
            prints[name] = Prints()
            try:
                capture.watch(partial(keep, name), prints[name].watcher(capture.targets))
            except Exception:
                if name != "longer":
                    raise
                del prints[name]
        if "changed" in prints:
            plain = prints.get("plain")
            run.rows.show_perturbed(prints["changed"], plain=plain, shown=None if plain is None else self._shown)
        if "longer" in prints:
            run.rows.show_lengths(prints["longer"], self._more)
        capture.shared.begin_batch()
        while True:
            run.rows.begin_pass()
            if not capture.run(partial(keep, MEASURED)) or run.rows.end_pass():
                continue
            if not run.rows.open:
                break
            run.rows.take_all(set(run.rows.open))
        run.end_batch(capture.shared.input_of)
        return results

    def _conclude(self, run: Run, targets: Sequence[TargetModule]) -> None:
        """Keep the spectra of a run; its states are no longer needed."""
        if targets:
            learned = run.learned()
            counted, spectra = spectra_of(learned, targets, n_components=self.n_components, stopped=self.stopped)
            self.reached |= learned.input_of.keys()
            self.table |= counted
            self.spectra |= spectra

    def _sample(self) -> None:
        """Keep a few weights of the targets whose weights are in memory now."""
        self.sampled |= sampled_weights(self.model, [name for name in self._to_sample if name not in self.sampled])

    def _check_rows(self) -> None:
        check_rows(self.spectra, reached=bool(self.reached), n_components=self.n_components, n_batches=self.n_batches)

    def _forward(self, batch: Any) -> Callable[[], Any]:
        def run() -> Any:
            with self.autocast():
                if self.forward is not None:
                    return self.forward(self.model, batch)
                arguments = forward_arguments(self.model, batch, keep_labels=False)
                args, kwargs = _mapped(arguments, lambda tensor: tensor.to(self.device))
                return self.model(*args, **kwargs)

        return run

    def _outside_names(self) -> list[str]:
        """Return the names of all weights outside the blocks."""
        prefixes = tuple(name + "." for name in self.blocks)
        return [name for name in self.model.state_dict() if not name.startswith(prefixes)]

    @contextmanager
    def _filled_on_demand(self) -> Iterator[None]:
        """Fill each module outside the blocks when it is called, and empty them all at the end."""
        handles = []
        owned: dict[str, list[str]] = {}
        for name in self._outside_names():
            owned.setdefault(name.rpartition(".")[0], []).append(name)
        for owner, names in owned.items():

            def fill(module: nn.Module, args: Any, names: Sequence[str] = names) -> None:
                self.weights.fill(names)

            handles.append(self.model.get_submodule(owner).register_forward_pre_hook(fill, prepend=True))
        try:
            if self._fill_outside:
                self.weights.fill(name for name in self._outside_names() if name in self.weights)
            yield
            self._sample()
        finally:
            for handle in handles:
                handle.remove()
            self.weights.empty()


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return nested tuples, lists and dicts with a function applied to their tensors and marks."""
    if type(value) in (tuple, list):
        return type(value)(_mapped(member, function) for member in value)
    if type(value) is dict:
        return {key: _mapped(member, function) for key, member in value.items()}
    return function(value) if isinstance(value, Tensor | _Waits) or value is HIDDEN else value


def _put_away(calls: Sequence[Call], variant: tuple[int, str], waiting: WaitingTensors) -> list[Call]:
    """Store the tensors among a variant's arguments in `waiting`; one that several blocks get is stored once."""
    keys: dict[int, _Waits] = {}

    def away(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in keys:
            keys[id(value)] = _Waits(("argument", variant, len(keys)))
            waiting[keys[id(value)].key] = value
        return keys[id(value)]

    return [Call(block=call.block, args=_mapped(call.args, away), kwargs=_mapped(call.kwargs, away)) for call in calls]


def _fetched(arguments: Any, hidden: Tensor, waiting: WaitingTensors, device: torch.device) -> Any:
    """Return arguments with the hidden state and the waiting tensors put back in their places."""
    return _mapped(arguments, lambda value: hidden if value is HIDDEN else waiting[value.key].to(device))
