"""Makes spectra from what runs have learned, and says what is doubtful about them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from evatune.activations.layer_type import TargetModule
from evatune.activations.padding import RowCounts
from evatune.activations.run import Learned
from evatune.activations.starved import stand_ins
from evatune.errors import EvaError, EvaWarning
from evatune.pca import AnyPCA, learn_all, on_host
from evatune.settings import Reason
from evatune.spectra import Spectra, Spectrum, Target

SHOWN_ERROR = 0.01
"""If components seem to miss more than this share of the best captured variance, the user gets a warning."""


def no_batch() -> EvaError:
    """Return the error for a run without any batch."""
    return EvaError("there was no batch to measure: the iterable is empty, or a generator that is used up already.")


def spectra_of(
    learned: Learned, targets: Sequence[TargetModule], *, n_components: int, stopped: Reason
) -> tuple[dict[str, Target], dict[str, Spectrum]]:
    """Return the targets of which any row counts and the spectrum of every input, both in the order of the model.

    Args:
        learned: what a run has learned.
        targets: its targets, in the order of the model.
        n_components: how many components were asked for.
        stopped: why the run ended; it is the reason of all inputs that have met no stopping rule.

    Raises:
        EvaError: there was no batch.
    """
    by_name, n_batches = {target.name: target for target in targets}, learned.n_batches
    if n_batches == 0:
        raise no_batch()
    standing_in = stand_ins(by_name, learned.pcas, learned.input_of, n_components=n_components, n_batches=n_batches)
    pcas = {key: learned.pcas[key] for key in by_name if key in learned.pcas and key not in standing_in}
    fitted = {key: pca for key, pca in pcas.items() if pca.is_fitted}
    learn_all(fitted.values())
    tensors = on_host(
        [tensor for pca in fitted.values() for tensor in (pca.components_, pca.singular_values_, pca.mean_)]
    )
    inputs = standing_in | {
        key: _spectrum(
            pca,
            tensors[3 * number : 3 * number + 3],
            n_batches=n_batches,
            stopped=learned.reasons.get(key, stopped),
            counts=RowCounts(*learned.row_counts.get(key, ())),
        )
        for number, (key, pca) in enumerate(fitted.items())
    }
    input_of = {name: name for name in standing_in} | learned.input_of
    counted = {
        name: Target(name=name, input=input_of[name], in_features=target.in_features, out_features=target.out_features)
        for name, target in by_name.items()
        if input_of.get(name) in inputs
    }
    return counted, {key: inputs[key] for key in by_name if key in inputs}


def check_rows(inputs: Mapping[str, Spectrum], *, reached: bool, n_components: int, n_batches: int) -> None:
    """Check that there are enough rows to measure anything.

    Args:
        inputs: the spectrum of every input.
        reached: whether any target got an input, also if all its rows are masked.
        n_components: how many components were asked for.
        n_batches: how many batches were passed.

    Raises:
        EvaError: no target was reached, all rows are masked, or no input has as many rows as components.
    """
    n_rows = max((spectrum.n_rows for spectrum in inputs.values()), default=0)
    if not reached:
        raise EvaError(f"none of the targets got an input in {n_batches} batches; choose others with target_modules.")
    if n_rows == 0:
        raise EvaError(
            f"all rows of all {n_batches} batches are masked; check attention_mask and labels, or measure without "
            "use_label_mask."
        )
    if n_rows < n_components:
        raise EvaError(
            f"{n_rows} rows in {n_batches} batches are fewer than the {n_components} components asked for; "
            "give more or longer batches, or a smaller rank, rho or n_components."
        )


def _spectrum(
    pca: AnyPCA, tensors: Sequence[Tensor], *, n_batches: int, stopped: Reason, counts: RowCounts
) -> Spectrum:
    """Return the spectrum of an input, with its components, singular values and mean on the CPU."""
    error, n_rows = pca.captured_error_, pca.n_samples_seen_
    components_kd, singular_values_k, mean_d = tensors
    if n_rows < len(components_kd) and stopped is not Reason.INTERRUPTED:
        stopped = Reason.FEWER_ROWS
    return Spectrum(
        components=components_kd,
        singular_values=singular_values_k,
        mean=mean_d,
        total_variance=pca.total_variance_,
        n_rows=n_rows,
        n_batches=n_batches,
        stopped=stopped,
        backend=pca.backend_,
        captured_error=None if math.isnan(error) else error,
        padding=counts.padding,
        unsure_share=min(1.0, counts.n_unsure / n_rows),
    )


def warn_of(spectra: Spectra, *, reached: Collection[str]) -> None:
    """Tell the user what is doubtful about spectra: a warning for each kind of doubt, which names the first input.

    Args:
        spectra: what was measured.
        reached: the targets that got an input, also if all its rows are masked.
    """
    n_batches = max(spectrum.n_batches for spectrum in spectra.inputs.values())
    doubts = (
        _of_experts(spectra, n_batches),
        _of_unreached(spectra, n_batches, reached),
        _of_few_rows(spectra, n_batches),
        _of_errors(spectra),
        _of_padding(spectra),
    )
    for doubt in filter(None, doubts):
        warnings.warn(doubt, EvaWarning, stacklevel=3)


def _of_experts(spectra: Spectra, n_batches: int) -> str | None:
    found = [key for key, spectrum in spectra.inputs.items() if spectrum.stopped is Reason.TOO_FEW_ROWS]
    if not found:
        return None
    return (
        f"{len(found)} of {len(spectra.inputs)} inputs are of experts that got fewer than {spectra.n_components} rows "
        f"in {n_batches} batches, the first is {found[0]!r}; they start from what the other experts of their block "
        "have seen."
    )


def _of_unreached(spectra: Spectra, n_batches: int, reached: Collection[str]) -> str | None:
    masked = " or only rows that are masked" if any(name in reached for name in spectra.unreached) else ""
    if not spectra.unreached:
        return None
    return (
        f"{len(spectra.unreached)} of {len(spectra.unreached) + len(spectra)} targets got no input{masked} in "
        f"{n_batches} batches and have no spectrum, the first is {spectra.unreached[0]!r}; an adapter there starts as "
        "LoRA does, with its rank and at random, unless exclude_modules leaves it out."
    )


def _of_few_rows(spectra: Spectra, n_batches: int) -> str | None:
    found = [
        key
        for key, spectrum in spectra.inputs.items()
        if spectrum.n_rows < len(spectrum.components) and spectrum.stopped is not Reason.TOO_FEW_ROWS
    ]
    if not found:
        return None
    first = spectra.inputs[found[0]]
    return (
        f"{len(found)} of {len(spectra.inputs)} inputs got fewer rows than components in {n_batches} batches, the "
        f"first is {found[0]!r} with {first.n_rows} rows for {len(first.components)} components, of which the last "
        "ones are arbitrary; give more batches, or leave such layers out with exclude_modules."
    )


def _of_errors(spectra: Spectra) -> str | None:
    errors = {key: spectrum.captured_error or 0.0 for key, spectrum in spectra.inputs.items()}
    found = [key for key, error in errors.items() if error > SHOWN_ERROR]
    if not found:
        return None
    worst = max(found, key=lambda key: errors[key])
    return (
        f"the components of {len(found)} of {len(errors)} inputs seem to miss more than {SHOWN_ERROR:.1%} of the "
        f"variance that the best ones capture, those of {worst!r} {errors[worst]:.1%}; where that matters and "
        "memory allows, measure with backend='exact'."
    )


def _of_padding(spectra: Spectra) -> str | None:
    unsure = {key: spectrum.unsure_share for key, spectrum in spectra.inputs.items() if spectrum.unsure_share}
    if not unsure:
        return None
    named = ", ".join(f"{key!r}: {share:.0%} of its rows" for key, share in list(unsure.items())[:4])
    return (
        f"padding among the rows of {len(unsure)} of {len(spectra.inputs)} inputs cannot be recognized and counts "
        f"({named}{', …' if len(unsure) > 4 else ''}); give batches without padding, or say with row_mask= what counts."
    )
