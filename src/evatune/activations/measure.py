"""`measure`: pass batches through a model and learn the spectrum of every input of its targets (Algorithm 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from evatune.activations.batches import forward_arguments
from evatune.activations.capture import Capture, encoder_output_test
from evatune.activations.distributed import Ranks, drive
from evatune.activations.measurement import Measurement, warn_of_errors
from evatune.activations.passes import Passes
from evatune.activations.preserve import measuring_state, preserved_random_state, uncompiled
from evatune.activations.rows import IGNORED_LABEL, RowMasks
from evatune.activations.sharding import held_interrupts, sharded_again, sharding_of, without_engine
from evatune.activations.stopping import BATCH_CAP, EXHAUSTED, INTERRUPTED, StoppingMonitor, StoppingRule
from evatune.activations.targets import TargetRules, find_targets, unwrap
from evatune.allocation import check_plan_settings, max_components
from evatune.errors import EvaError, near_misses
from evatune.pca import StreamingPCA
from evatune.pca.products import has_fast_bfloat16
from evatune.spectra import Spectra

Forward = Callable[[nn.Module, Any], Any]


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    n_components: int | None = None,
    rank: int | Mapping[str, int] | None = None,
    rho: float = 2.0,
    metric: str = "ratio",
    max_batches: int = 64,
    tau: float | None = 0.99,
    delta: float = 1.0,
    min_gain: float | None = 0.02,
    use_label_mask: bool = False,
    label_mask_value: int = IGNORED_LABEL,
    backend: str = "auto",
    tolerance: float | None = 1e-3,
    center: bool = True,
    dtype: str | torch.dtype | None = None,
    forward: Forward | None = None,
    progress: bool = True,
    seed: int = 0,
    state_device: str | torch.device | None = None,
    target_parameters: Sequence[str] | None = None,
) -> Spectra:
    """Measure the activations that enter the targets of a model while batches of downstream data pass through it.

    Every input is followed by a `StreamingPCA`; targets that receive the very same tensor share one. Measuring ends
    when every input is done by one of the two stopping rules, at `max_batches`, or when the data end; all inputs go on
    accumulating until then. The model, its mode, hooks, adapters and the random number generators are left as they
    were. Ctrl-C ends with what has been measured so far.

    Args:
        model: a torch model, bare or wrapped by PEFT (adapters are switched off while measuring).
        batches: any iterable of mappings, tensors or tuples that start with one of these; gone through once.
        target_modules: which modules, by the rules of PEFT's `LoraConfig`: names or name endings, one regular
            expression, or "all-linear".
        exclude_modules: what is left out of these.
        layers_to_transform: only layers with these numbers.
        layers_pattern: name of the list of layers.
        n_components: how many components to keep of each input; by default round(rho * rank) for the largest rank,
            or 32 without a rank.
        rank: rank r of the later plan, for all targets or by target name. The stopping rules then look only at the
            components that a plan from the present spectra would need, as the paper does.
        rho: of the later plan.
        metric: of the later plan.
        max_batches: the most batches to pass, whatever the stopping rules say.
        tau: cosine of a component with itself one batch before that counts as converged (the paper's rule); None
            switches the rule off.
        delta: share of the components of an input that must have converged.
        min_gain: an input is also done when doubling the data would gain less than this share of captured variance on
            rows not yet seen, see `evatune.activations.stopping`; None switches the rule off.
        use_label_mask: leave out positions whose label the loss ignores. With short answers few rows remain
            (Appendix F.3 of the paper).
        label_mask_value: the label that the loss ignores.
        backend: of `StreamingPCA`.
        tolerance: of `StreamingPCA`: what sketches may miss before they get wider or exact.
        center: subtract the mean, as Algorithm 2 does.
        dtype: run the forward pass under autocast in this dtype; "auto" takes bfloat16 where it is fast; None runs the
            model as it is.
        forward: calls the model with a batch, where the default (see `forward_arguments`) does not fit.
        progress: show a bar on standard error.
        seed: of the sketches.
        state_device: where the states are kept and rows are multiplied; by default where the rows are. "cpu" spares the
            memory of an accelerator, for copying every row.
        target_parameters: names or name endings of parameters that hold the weights of all experts of a layer, beside
            `target_modules`, which may then be empty.

    Returns:
        Spectra by target name; `stopped` of each says why measuring ended.

    Raises:
        EvaError: no batch, no matching target, all rows masked, fewer rows than components, a NaN or infinite
            activation (with the target's name and the batch), or a setting out of range.

    Cost: the forward passes up to the last target, and for each batch two thin matrix products per input
    (`evatune.pca.sketch`).
    """
    n_components = _check_settings(n_components, rank, rho, metric, max_batches)
    new_pca = partial(StreamingPCA, backend=backend, tolerance=tolerance, center=center, seed=seed, rough_looks=True)
    new_pca(n_components)  # refuses settings before the first batch is passed
    rule = StoppingRule(tau=tau, delta=delta, min_gain=min_gain)
    rules = TargetRules(
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        target_parameters=target_parameters,
    )
    model = without_engine(model)
    sharded = sharding_of(model) is not None
    targets = find_targets(model, rules)
    if isinstance(rank, Mapping):
        rank = _ranks_of([target.name for target in targets], rank)
    ranks = Ranks() if Ranks.present() else None
    base = unwrap(model)
    measurement = Measurement(
        targets=targets,
        new_pca=new_pca,
        n_components=n_components,
        monitor=StoppingMonitor(rule, checks_per_doubling=2 if ranks is None else 1),
        plan_options=None if rank is None else {"rank": rank, "rho": rho, "metric": metric},
        alone=ranks is None,
        state_device=None if state_device is None else torch.device(state_device),
    )
    encoder_decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    autocast = _autocast(base, dtype)
    started = time.perf_counter()
    stopped, n_batches = EXHAUSTED, 0
    # Autocast, ours or the caller's, concerns the model; sums and checks stay in full precision.
    full_precision = torch.autocast(_device_type(base), enabled=False)
    capture = Capture(targets, full_precision(measurement.consume), unbroken=sharded)
    bar = tqdm(
        total=max_batches,
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
        masks_of = partial(
            RowMasks.of,
            encoder_decoder=encoder_decoder,
            use_label_mask=use_label_mask,
            label_mask_value=label_mask_value,
        )
        # Parts of a sharded model are gathered by what is around them, so that one is called from outside.
        ours = partial(_call, model if sharded else base, base, keep_labels=encoder_decoder)
        prepare = ours if forward is None else partial(_given_call, forward, model)
        passes = Passes(batches, prepare=prepare, masks_of=masks_of, capture=capture, measurement=measurement)
        try:
            if ranks is None:
                for n_batches in passes:
                    bar.update()
                    bar.set_postfix_str(measurement.progress_text())
                    if measurement.all_done() or n_batches == max_batches:
                        stopped = BATCH_CAP
                        break
                    if interrupted():
                        raise KeyboardInterrupt
            else:
                n_batches, stopped = drive(
                    passes,
                    measurement,
                    ranks,
                    max_batches=max_batches,
                    bar=bar,
                    together=sharded,
                    interrupted=interrupted,
                )
        except KeyboardInterrupt:
            if n_batches == 0:  # nothing whole was measured
                raise
            stopped = INTERRUPTED
    settings = {
        "target_modules": _listed(target_modules),
        "target_parameters": None if target_parameters is None else sorted(target_parameters),
        "exclude_modules": _listed(exclude_modules),
        "layers_to_transform": _listed(layers_to_transform),
        "layers_pattern": _listed(layers_pattern),
        "n_components": n_components,
        "rank": rank,
        "rho": rho,
        "metric": metric,
        "max_batches": max_batches,
        "n_batches": n_batches,
        "tau": tau,
        "delta": delta,
        "min_gain": min_gain,
        "use_label_mask": use_label_mask,
        "label_mask_value": label_mask_value,
        "backend": backend,
        "tolerance": tolerance,
        "center": center,
        "dtype": str(dtype) if dtype is not None else None,
        "seed": seed,
        "state_device": None if state_device is None else str(state_device),
    }
    if ranks is not None:
        settings |= {"processes": ranks.size, "bytes_sent": ranks.bytes_sent}
    spectra = Spectra(
        targets=measurement.target_table(measurement.input_of, n_batches=n_batches),
        inputs=measurement.spectra(stopped, n_batches=n_batches),
        model_name=str(getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__),
        settings=settings,
        versions={name: metadata.version(name) for name in ("evatune", "torch")},
        seconds=time.perf_counter() - started,
        history=measurement.history,
    )
    warn_of_errors(spectra.inputs)
    return spectra


def _listed(value: Any) -> Any:
    """Return a setting as JSON has it: sets and tuples as sorted lists."""
    return value if value is None or isinstance(value, str | int) else sorted(value)


def _call(model: nn.Module, base: nn.Module, batch: Any, *, keep_labels: bool) -> Callable[[], Any]:
    """Return the call of a model, of which `base` is the inside, with a batch."""
    args, kwargs = forward_arguments(base, batch, keep_labels=keep_labels)
    return partial(model, *args, **kwargs)


def _given_call(forward: Forward, model: nn.Module, batch: Any) -> Callable[[], Any]:
    return partial(forward, model, batch)


def _check_settings(
    n_components: int | None, rank: int | Mapping[str, int] | None, rho: float, metric: str, max_batches: int
) -> int:
    """Return how many components to keep."""
    ranks = {} if rank is None else dict(rank) if isinstance(rank, Mapping) else {"": rank}
    for name, value in ranks.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            where = f" for {name}" if name else ""
            raise EvaError(f"rank must be a whole number of at least 1, got {value!r}{where}.")
    check_plan_settings(rho=rho, metric=metric)
    if isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 1:
        raise EvaError(f"max_batches must be a whole number of at least 1, got {max_batches!r}.")
    most = max(ranks.values(), default=0)
    needed = max_components(most, rho)
    if n_components is None:
        return needed if ranks else 32
    if isinstance(n_components, bool) or not isinstance(n_components, int) or n_components < 1:
        raise EvaError(f"n_components must be a whole number of at least 1, got {n_components!r}.")
    if n_components < needed:
        raise EvaError(f"n_components={n_components} is less than rank {most} with rho {rho:g} needs, {needed}.")
    return n_components


def _ranks_of(names: Sequence[str], ranks: Mapping[str, int]) -> dict[str, int]:
    """Return ranks by target name in the order of the targets; a mapping that names others is an error."""
    missing = [name for name in names if name not in ranks]
    unknown = [name for name in ranks if name not in names]
    if unknown:
        raise EvaError(f"rank names {unknown[0]!r}, which is no target{near_misses(str(unknown[0]), names)}.")
    if missing:
        raise EvaError(f"rank names no value for {len(missing)} targets, the first {missing[0]!r}.")
    return {name: ranks[name] for name in names}


def _autocast(model: nn.Module, dtype: str | torch.dtype | None) -> Any:
    """Return the context in which the forward pass runs."""
    if dtype is None:
        return nullcontext()
    device_type = _device_type(model)
    if dtype == "auto":
        return torch.autocast(device_type, torch.bfloat16) if has_fast_bfloat16(device_type) else nullcontext()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise EvaError(f"dtype must be a float torch.dtype, 'auto' or None, got {dtype!r}.")
    return torch.autocast(device_type, dtype)


def _device_type(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters() if parameter.device.type != "meta"), "cpu")
