"""Which spectra start which layers of an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from evatune.errors import EvaError, EvaWarning
from evatune.spectra import Spectra


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Spectra of an adapter's layers."""

    spectra: Spectra
    """The spectra of the layers that have one, and no others."""
    without: tuple[str, ...] = ()
    """Layers that no batch reached: they keep the rank and the random start that LoRA gives them."""


def fit_spectra(spectra: Spectra, widths: Mapping[str, int], *, warn: bool = True) -> Fit:
    """Return the spectra of an adapter's layers; those of other modules are ignored.

    Args:
        spectra: measured on this model, of these modules or of more.
        widths: the width of the input of each layer, by name.
        warn: whether to warn of layers without spectrum; `measure` does so itself.

    Raises:
        EvaError: a layer is in the spectra with another width, or it is neither in the spectra nor among the targets
            that no batch reached.
    """
    missing = [name for name in widths if name not in spectra.targets]
    unknown = [name for name in missing if name not in spectra.unreached]
    resized = [
        f"{name} ({spectra.targets[name].in_features} features there, {here} here)"
        for name, here in widths.items()
        if name in spectra.targets and spectra.targets[name].in_features != here
    ]
    differences = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("of its layers not in the spectra", unknown), ("of other sizes", resized))
        if names
    ]
    if differences or len(missing) == len(widths):
        raise EvaError(
            f"the spectra do not fit the adapter ({'; '.join(differences) or 'none of its layers was reached'}); "
            "measure this model with the adapter's own target_modules."
        )
    if missing and warn:
        warnings.warn(
            f"{len(missing)} of {len(widths)} layers got no input and start as LoRA does, with its rank and a random "
            f"A, the first is {missing[0]!r}; leave them out with exclude_modules, or give batches that reach them.",
            EvaWarning,
            stacklevel=3,
        )
    targets = {name: spectra.targets[name] for name in widths if name in spectra.targets}
    return Fit(spectra=replace(spectra, targets=targets), without=tuple(missing))
