"""`measure`: pass batches through a model and learn the spectrum of every input of its targets (Algorithm 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from evatune.activations.batches import forward_arguments
from evatune.activations.capture import Capture, encoder_output_test
from evatune.activations.layers.targets import TargetRules, find_targets, unwrap
from evatune.activations.passes import Passes
from evatune.activations.preserve import measuring_state, preserved_random_state, uncompiled
from evatune.activations.processes.lockstep import Ranks, drive
from evatune.activations.processes.sharded_models import held_interrupts, sharded_again, sharding_of, without_engine
from evatune.activations.rows import RowMasks
from evatune.activations.run import Measurement, warn_of_errors
from evatune.activations.sharing import SharedInputs
from evatune.activations.stopping import BATCH_CAP, EXHAUSTED, INTERRUPTED, StoppingMonitor
from evatune.errors import EvaError, near_misses
from evatune.pca import StreamingPCA
from evatune.pca.products import has_fast_bfloat16
from evatune.settings import Measuring, Planning, Stopping, takes
from evatune.spectra import Spectra

Forward = Callable[[nn.Module, Any], Any]
RowMask = Callable[[Any], torch.Tensor]


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

    Every input is followed by a `StreamingPCA`; targets that receive the very same tensor share one. Measuring ends
    when every input is done by one of the two stopping rules, at `max_batches`, or when the data end; all inputs go on
    accumulating until then. The model, its mode, hooks, adapters and the random number generators are left as they
    were. Ctrl-C ends with what has been measured so far.

    Args:
        model: a torch model, bare or wrapped by PEFT (adapters are switched off while measuring).
        batches: any iterable of mappings, tensors or tuples that start with one of these; gone through once.
        forward: calls the model with a batch, where the default (see `forward_arguments`) does not fit.
        row_mask: returns which positions of a batch count, (B, T), instead of what its masks say; activations of any
            other leading shape count whole.
        progress: show a bar on standard error.
        settings: all options in one object; the options below change it.
        options: see the list below.

    Returns:
        Spectra by target name; `stopped` of each says why measuring ended.

    Raises:
        EvaError: no batch, no matching target, all rows masked, fewer rows than components, a NaN or infinite
            activation (with the target's name and the batch), or a setting out of range.

    Cost: the forward passes up to the last target, and for each batch two thin matrix products per input
    (`evatune.pca.sketch`).
    """
    settings = Measuring.of(options, settings=settings, call="evatune.measure")
    n_components = settings.n_kept
    new_pca = pca_maker(settings)
    new_pca(n_components)  # refuses settings before the first batch is passed
    model = without_engine(model)
    sharded = sharding_of(model) is not None
    targets = find_targets(model, settings.part(TargetRules))
    settings = with_ranks_of(settings, [target.name for target in targets])
    ranks = Ranks() if Ranks.present() else None
    base = unwrap(model)
    measurement = Measurement(
        targets=targets,
        new_pca=new_pca,
        n_components=n_components,
        monitor=StoppingMonitor(settings.part(Stopping), checks_per_doubling=2 if ranks is None else 1),
        planned=None if settings.rank is None else settings.part(Planning),
        alone=ranks is None,
        state_device=None if settings.state_device is None else torch.device(settings.state_device),
    )
    encoder_decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    autocast = autocast_of(base, settings.dtype)
    started = time.perf_counter()
    stopped, n_batches = EXHAUSTED, 0
    # Autocast, ours or the caller's, concerns the model; sums and checks stay in full precision.
    full_precision = torch.autocast(_device_type(base), enabled=False)
    shared = SharedInputs(full_precision(measurement.consume), measurement.split)
    capture = Capture(base, targets, shared, to_the_end=forward is not None, unbroken=sharded)
    bar = tqdm(
        total=settings.max_batches,
        unit="batch",
        desc="measuring",
        disable=not progress or (ranks is not None and ranks.rank > 0),
        dynamic_ncols=True,
    )
    # The loader runs inside, so that its shuffling does not advance the caller's generators either.
    with (
        torch.inference_mode(False),  # tensors made in inference mode cannot tell whether they were changed in place
        torch.no_grad(),
        preserved_random_state(),
        measuring_state(base),
        uncompiled(model),
        capture,
        encoder_output_test(base) if encoder_decoder else nullcontext() as is_encoder_output,
        autocast,
        bar,
        sharded_again(model),
        held_interrupts() if sharded else nullcontext(lambda: False) as interrupted,
    ):
        measurement.is_encoder_output = is_encoder_output or measurement.is_encoder_output
        masks_of = partial(RowMasks.of, encoder_decoder=encoder_decoder, use_label_mask=settings.use_label_mask)
        if row_mask is not None:
            masks_of = partial(_given_mask, row_mask)
        # Parts of a sharded model are gathered by what is around them, so that one is called from outside.
        ours = partial(_call, model if sharded else base, base, keep_labels=encoder_decoder)
        prepare = ours if forward is None else partial(_given_call, forward, model)
        passes = Passes(batches, prepare=prepare, masks_of=masks_of, capture=capture, measurement=measurement)
        try:
            if ranks is None:
                for n_batches in passes:
                    bar.update()
                    bar.set_postfix_str(measurement.progress_text())
                    if measurement.all_done() or n_batches == settings.max_batches:
                        stopped = BATCH_CAP
                        break
                    if interrupted():
                        raise KeyboardInterrupt
            else:
                n_batches, stopped = drive(
                    passes,
                    measurement,
                    ranks,
                    max_batches=settings.max_batches,
                    bar=bar,
                    together=sharded,
                    interrupted=interrupted,
                )
        except KeyboardInterrupt:
            if n_batches == 0:  # nothing whole was measured
                raise
            stopped = INTERRUPTED
    kept = settings.to_json() | {"n_components": n_components, "n_batches": n_batches}
    if ranks is not None:
        kept |= {"processes": ranks.size, "bytes_sent": ranks.bytes_sent}
    table = measurement.target_table(measurement.input_of, n_batches=n_batches)
    spectra = Spectra(
        targets=table,
        inputs=measurement.spectra(stopped, n_batches=n_batches),
        model_name=str(getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__),
        settings=kept,
        versions={name: metadata.version(name) for name in ("evatune", "torch")},
        seconds=time.perf_counter() - started,
        history=measurement.history,
        unreached=tuple(target.name for target in targets if target.name not in table),
    )
    warn_of_errors(spectra.inputs)
    return spectra


def _call(model: nn.Module, base: nn.Module, batch: Any, *, keep_labels: bool) -> Callable[[], Any]:
    """Return the call of a model, of which `base` is the inside, with a batch."""
    args, kwargs = forward_arguments(base, batch, keep_labels=keep_labels)
    return partial(model, *args, **kwargs)


def _given_mask(row_mask: RowMask, batch: Any) -> RowMasks:
    return RowMasks(encoder_bt=row_mask(batch).bool())


def _given_call(forward: Forward, model: nn.Module, batch: Any) -> Callable[[], Any]:
    return partial(forward, model, batch)


def pca_maker(settings: Measuring) -> Callable[[int], StreamingPCA]:
    """Return what makes the streaming PCA that keeps so many components of an input."""
    return partial(
        StreamingPCA,
        backend=settings.backend,
        tolerance=settings.tolerance,
        center=settings.center,
        seed=settings.seed,
    )


def with_ranks_of(settings: Measuring, names: Sequence[str]) -> Measuring:
    """Return the settings with ranks in the order of the targets, where they are given by name.

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


def autocast_of(model: nn.Module, dtype: str | None) -> Any:
    """Return the context in which the forward pass runs: autocast in this dtype, `auto` where bfloat16 is fast."""
    if dtype is None:
        return nullcontext()
    device_type = _device_type(model)
    if dtype == "auto":
        return torch.autocast(device_type, torch.bfloat16) if has_fast_bfloat16(device_type) else nullcontext()
    return torch.autocast(device_type, getattr(torch, dtype))


def _device_type(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters() if parameter.device.type != "meta"), "cpu")
