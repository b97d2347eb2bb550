"""`measure`: pass batches through a model and learn the spectrum of every input of its targets (Algorithm 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from evatune.activations.batches import (
    device_of,
    devices_of,
    forward_arguments,
    is_encoder_decoder,
    reader_of,
    reserved_tokens,
    takes_entry,
    with_decoder_inputs,
)
from evatune.activations.capture import Capture
from evatune.activations.layer_type import TargetModule
from evatune.activations.layers.targets import TargetRules, find_targets, unwrap
from evatune.activations.passes import Passes
from evatune.activations.planning import PlanAhead
from evatune.activations.positions import DECODER, INPUTS, BatchPositions, Given, entries_of
from evatune.activations.preserve import measuring_state, preserved_random_state, uncompiled
from evatune.activations.processes.exchange import Processes
from evatune.activations.processes.lockstep import measure_in_lockstep
from evatune.activations.processes.sharded_models import sharded_again, sharding_of, without_engine
from evatune.activations.results import check_rows, spectra_of, warn_of
from evatune.activations.run import Learned, Run
from evatune.activations.sharing import SharedInputs
from evatune.errors import EvaError, near_misses
from evatune.fingerprint import sampled_weights
from evatune.hardware import autocast, versions_of
from evatune.interruption import ENDS_STEP, ENDS_TOGETHER, KEEPS, held_interrupts
from evatune.pca import StreamingPCA
from evatune.settings import Measuring, Planning, Reason, Stopping, takes
from evatune.spectra import Spectra

Forward = Callable[[nn.Module, Any], Any]
RowMask = Callable[[Any], Given]
BAR = "{desc} {n_fmt}/{total_fmt} {bar:10} {remaining} left{postfix}"
"""The progress bar; what it says has room in 80 columns."""


@takes(Measuring)
def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    row_mask: RowMask | None = None,
    progress: bool = True,
    settings: Measuring | None = None,
    **options: Any,
) -> Spectra:
    """Measure the activations that enter the targets of a model while batches of downstream data pass through it.

    Every input has a `StreamingPCA`; targets that receive the same tensor share one. Measuring ends
    when every input is done by one of the two stopping rules, at `max_batches`, or when the data end; all inputs go on
    accumulating until then. The model, its mode, hooks, adapters and the random number generators are left as they
    were. Ctrl-C ends with what has been measured so far.

    Args:
        model: a torch model, bare or wrapped by PEFT (adapters are switched off while measuring).
        batches: any iterable of mappings, tensors or tuples that start with one of these; iterated once.
        forward: calls the model with a batch, where the default (see `forward_arguments`) does not fit.
        row_mask: takes a batch and returns which of its positions count, (B, T), or a mapping from names of modules to
            such masks; the masks of the batch are then ignored. Of activations with another leading shape, all rows
            count.
        progress: show a bar on standard error.
        settings: all options in one object; the options below change it.
        options: see the list below.

    Returns:
        Spectra by target name; `stopped` of each says why measuring ended.

    Raises:
        EvaError: no batch, no matching target, all rows masked, fewer rows than components, a NaN or infinite
            activation (with the target's name and the batch), or a setting out of range.

    Cost: the forward passes up to the last target, and for each batch and input two thin matrix products
    (`evatune.pca.sketch`).
    """
    settings = Measuring.of(options, settings=settings, call="evatune.measure")
    new_pca = pca_maker(settings)
    new_pca(settings.n_kept)  # raises on invalid settings before the first batch
    model = without_engine(model)
    sharded = sharding_of(model) is not None
    targets = find_targets(model, settings.part(TargetRules))
    settings = with_ranks_of(settings, [target.name for target in targets])
    processes = Processes() if Processes.present() else None
    base = unwrap(model)
    started = time.perf_counter()
    held = ENDS_STEP if sharded else KEEPS if processes is None else ENDS_TOGETHER
    with held_interrupts(held=held) as interrupted:
        # The loader runs inside, so that its shuffling does not advance the caller's generators either.
        with _ready(model, base, dtype=settings.dtype), _bar(settings, processes, shown=progress) as bar:
            run = _new_run(targets, settings, new_pca, alone=processes is None)
            read = reader_of(base, use_label_mask=settings.use_label_mask, row_mask=row_mask)
            with _passes(model, batches, targets=targets, run=run, read=read, forward=forward) as passes:
                go = _measure_alone if processes is None else partial(measure_in_lockstep, processes=processes)
                learned, stopped = go(
                    passes, run, max_batches=settings.max_batches, bar=bar, together=sharded, interrupted=interrupted
                )
        counted, inputs = spectra_of(learned, targets, n_components=settings.n_kept, stopped=stopped)
    check_rows(inputs, reached=bool(learned.input_of), n_components=settings.n_kept, n_batches=learned.n_batches)
    kept = settings.to_json() | {"n_components": settings.n_kept, "n_batches": learned.n_batches}
    if processes is not None:
        kept |= {"processes": processes.size, "bytes_sent": processes.bytes_sent}
    spectra = Spectra(
        targets=counted,
        inputs=inputs,
        model_name=str(getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__),
        settings=kept,
        versions=versions_of("evatune", "torch"),
        seconds=time.perf_counter() - started,
        history=learned.history,
        weights=sampled_weights(base, counted),
        unreached=tuple(target.name for target in targets if target.name not in counted),
    )
    warn_of(spectra, reached=learned.input_of)
    return spectra


@contextmanager
def _ready(model: nn.Module, base: nn.Module, *, dtype: str | None) -> Iterator[None]:
    """Make a model ready to be measured; afterwards it is as it was, and so are the random number generators."""
    with (
        torch.inference_mode(False),  # tensors made in inference mode do not count changes
        torch.no_grad(),
        preserved_random_state(),
        measuring_state(base),
        uncompiled(model),
        _autocast(base, dtype),
        sharded_again(model),
    ):
        yield


def _bar(settings: Measuring, processes: Processes | None, *, shown: bool) -> Any:
    """Return the progress bar, which only the first of several processes shows."""
    return tqdm(
        total=settings.max_batches,
        unit="batch",
        desc="measuring",
        bar_format=BAR,
        disable=not shown or (processes is not None and processes.number > 0),
        dynamic_ncols=True,
    )


@contextmanager
def _passes(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    targets: Sequence[TargetModule],
    run: Run,
    read: Callable[[Any], BatchPositions],
    forward: Forward | None,
) -> Iterator[Passes]:
    """Give the passes of batches through a model, whose targets have hooks meanwhile; see `measure`."""
    base, sharded = unwrap(model), sharding_of(model) is not None
    # Autocast, ours or the caller's, is for the model only; sums and checks stay in full precision.
    shared = SharedInputs(torch.autocast(device_of(base).type, enabled=False)(run.take), run.split, run.look)
    # Outer modules gather the parts of a sharded model, so such a model is called by its outermost module.
    ours = partial(_call, model if sharded else base, base, keep_labels=is_encoder_decoder(base))
    with Capture(base, targets, shared, to_the_end=forward is not None, unbroken=sharded) as capture:
        yield Passes(
            batches if forward is not None else map(partial(with_decoder_inputs, base), batches),
            prepare=ours if forward is None else partial(_given_call, forward, model),
            read=read,
            capture=capture,
            run=run,
            takes=partial(takes_entry, base) if forward is None else lambda name: False,
            reserved=reserved_tokens(base),
        )


def _new_run(
    targets: Sequence[TargetModule], settings: Measuring, new_pca: Callable[[int], StreamingPCA], *, alone: bool
) -> Run:
    """Return what measures the targets; `alone` if this process is the only one."""
    return Run(
        targets=targets,
        new_pca=new_pca,
        n_components=settings.n_kept,
        rule=settings.part(Stopping),
        needed=None if settings.rank is None else PlanAhead(settings.part(Planning), targets),
        state_device=None if settings.state_device is None else torch.device(settings.state_device),
        checks_per_doubling=2 if alone else 1,
        alone=alone,
    )


@contextmanager
def _autocast(model: nn.Module, dtype: str | None) -> Iterator[None]:
    """Let the passes compute in another dtype, on all kinds of devices on which the model has weights."""
    with ExitStack() as stack:
        for kind in sorted({place.type for place in devices_of(model)}):
            stack.enter_context(autocast(torch.device(kind), dtype))
        yield


def _measure_alone(
    passes: Passes, run: Run, *, max_batches: int, bar: Any, interrupted: Callable[[], bool], together: bool
) -> tuple[Learned, Reason]:
    """Pass batches until measuring ends, and return what was learned and why it ended."""
    stopped = Reason.EXHAUSTED
    try:
        for n_batches in passes:
            bar.update()
            bar.set_postfix_str(run.progress_text())
            if run.is_done or n_batches == max_batches:
                stopped = Reason.BATCH_CAP
                break
            if together and interrupted():
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        if passes.n_passed == 0:  # not one whole batch was measured
            raise
        stopped = Reason.INTERRUPTED
    return run.learned(), stopped


def _call(model: nn.Module, base: nn.Module, batch: Any, *, keep_labels: bool) -> Callable[[], Any]:
    """Return a function that calls a model with a batch; `base` is the model without wrappers."""
    entries = entries_of(batch)
    keep_labels = keep_labels and not any(DECODER + name in entries for name in INPUTS)
    args, kwargs = forward_arguments(base, batch, keep_labels=keep_labels)
    return partial(model, *args, **kwargs)


def _given_call(forward: Forward, model: nn.Module, batch: Any) -> Callable[[], Any]:
    return partial(forward, model, batch)


def pca_maker(settings: Measuring) -> Callable[[int], StreamingPCA]:
    """Return a function from a number of components to a new streaming PCA that keeps them."""
    return partial(
        StreamingPCA,
        backend=settings.backend,
        tolerance=settings.tolerance,
        center=settings.center,
        seed=settings.seed,
    )


def with_ranks_of(settings: Measuring, names: Sequence[str]) -> Measuring:
    """Return the settings; if ranks are given by name, put them in the order of the targets.

    Raises:
        EvaError: a target has no rank, or a rank names something else.
    """
    ranks = settings.rank
    if not isinstance(ranks, Mapping):
        return settings
    missing = [name for name in names if name not in ranks]
    unknown = [name for name in ranks if name not in names]
    if unknown:
        raise EvaError(f"rank names {unknown[0]!r}, which is no target{near_misses(str(unknown[0]), names)}.")
    if missing:
        raise EvaError(f"rank names no value for {len(missing)} targets, the first {missing[0]!r}.")
    return replace(settings, rank={name: ranks[name] for name in names})
