"""Makes spectra from what runs have learned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from evatune.activations.layer_type import TargetModule
from evatune.activations.padding import RowCounts
from evatune.activations.run import Learned
from evatune.activations.starved import stand_ins
from evatune.errors import EvaError, EvaWarning
from evatune.pca import AnyPCA, learn_all, on_host
from evatune.settings import Reason
from evatune.spectra import Spectrum, Target

SHOWN_ERROR = 0.01
"""If components seem to miss more than this share of the best captured variance, the user gets a warning."""


def no_batch() -> EvaError:
    """Return the error for a run without any batch."""
    return EvaError("there was no batch to measure: the iterable is empty, or a generator that is used up already.")


def spectra_of(
    learned: Learned, targets: Sequence[TargetModule], *, n_components: int, stopped: Reason
) -> tuple[dict[str, Target], dict[str, Spectrum]]:
    """Return the targets that were reached and the spectrum of every input, both in the order of the model.

    Warns of targets that got no input, and of experts that got too few rows.

    Args:
        learned: what a run has learned.
        targets: its targets, in the order of the model.
        n_components: how many components were asked for.
        stopped: why the run ended; it is the reason of all inputs that have met no stopping rule.

    Raises:
        EvaError: there was no batch, or fewer rows than components, or every row of an input is masked.
    """
    by_name, n_batches = {target.name: target for target in targets}, learned.n_batches
    if n_batches == 0:
        raise no_batch()
    standing_in = stand_ins(by_name, learned.pcas, learned.input_of, n_components=n_components, n_batches=n_batches)
    if standing_in:
        warnings.warn(
            f"{len(standing_in)} of {len(learned.pcas.keys() | standing_in.keys())} inputs are of experts that got "
            f"fewer than {n_components} rows in {n_batches} batches, the first is {next(iter(standing_in))!r}; "
            "they start from what the other experts of their block have seen.",
            EvaWarning,
            stacklevel=3,
        )
    input_of = {name: name for name in by_name if name in standing_in} | learned.input_of
    unreached = [name for name in by_name if name not in input_of]
    if unreached:
        warnings.warn(
            f"{len(unreached)} of {len(by_name)} targets got no input in {n_batches} batches and have no "
            f"spectrum, the first is {unreached[0]!r}; an adapter there starts as LoRA does, with its rank and "
            "at random, unless exclude_modules leaves it out.",
            EvaWarning,
            stacklevel=3,
        )
    pcas = {key: learned.pcas[key] for key in by_name if key in learned.pcas and key not in standing_in}
    fitted = {key: pca for key, pca in pcas.items() if pca.is_fitted}
    n_rows = max((pca.n_samples_seen_ for pca in learned.pcas.values() if pca.is_fitted), default=0)
    _check_rows(n_rows, n_components, n_batches)
    for key in dict.fromkeys(learned.input_of.values()):
        if key not in fitted and key not in standing_in:
            raise EvaError(f"every row that entered {key!r} is masked; leave it out with exclude_modules.")
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
    reached = {
        name: Target(name=name, input=input_of[name], in_features=target.in_features, out_features=target.out_features)
        for name, target in by_name.items()
        if name in input_of
    }
    return reached, {key: inputs[key] for key in by_name if key in inputs}


def warn_of_errors(spectra: Mapping[str, Spectrum]) -> None:
    """Tell the user how many of the inputs have components that seem to miss much."""
    errors = {
        key: error for key, spectrum in spectra.items() if (error := spectrum.captured_error or 0.0) > SHOWN_ERROR
    }
    if errors:
        worst = max(errors, key=lambda key: errors[key])
        warnings.warn(
            f"the components of {len(errors)} of {len(spectra)} inputs seem to miss more than {SHOWN_ERROR:.1%} of the "
            f"variance that the best ones capture, those of {worst!r} {errors[worst]:.1%}; where that matters and "
            "memory allows, measure with backend='exact'.",
            EvaWarning,
            stacklevel=3,
        )


def _check_rows(n_rows: int, n_components: int, n_batches: int) -> None:
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
    error = pca.captured_error_
    components_kd, singular_values_k, mean_d = tensors
    return Spectrum(
        components=components_kd,
        singular_values=singular_values_k,
        mean=mean_d,
        total_variance=pca.total_variance_,
        n_rows=pca.n_samples_seen_,
        n_batches=n_batches,
        stopped=stopped,
        backend=pca.backend_,
        captured_error=None if math.isnan(error) else error,
        padding=counts.padding,
        unsure_share=min(1.0, counts.n_unsure / pca.n_samples_seen_),
    )


def warn_of_padding(spectra: Mapping[str, Spectrum]) -> None:
    """Warn of the inputs whose counted rows may include padding, and how many rows that concerns."""
    unsure = {key: spectrum.unsure_share for key, spectrum in spectra.items() if spectrum.unsure_share}
    if unsure:
        named = ", ".join(f"{key!r}: {share:.0%} of its rows" for key, share in list(unsure.items())[:4])
        warnings.warn(
            f"padding among the rows of {len(unsure)} of {len(spectra)} inputs cannot be recognized and counts ({named}"
            f"{', …' if len(unsure) > 4 else ''}); give batches without padding, or say with row_mask= what counts.",
            EvaWarning,
            stacklevel=3,
        )
