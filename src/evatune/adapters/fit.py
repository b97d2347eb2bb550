"""Which spectra start which layers of an adapter, and which plan fits them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from evatune.allocation import RankPlan
from evatune.errors import EvaError, EvaWarning
from evatune.fingerprint import is_other_model
from evatune.spectra import Spectra


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Spectra of an adapter's layers."""

    spectra: Spectra
    """The spectra of the layers that have one, and no others."""
    without: tuple[str, ...] = ()
    """Layers that no batch reached: they keep the rank and the random start that LoRA gives them."""


def fit_spectra(
    spectra: Spectra, widths: Mapping[str, int], *, model: nn.Module, force: bool = False, warn: bool = True
) -> Fit:
    """Return the spectra of an adapter's layers; those of other modules are ignored.

    Args:
        spectra: measured on this model, of these modules or of more.
        widths: the width of the input of each layer, by name.
        model: the base model of the adapter, without wrapper.
        force: whether to take spectra of another model, as long as their sizes fit.
        warn: whether to warn of layers without spectrum; `measure` does so itself.

    Raises:
        EvaError: a layer is in the spectra with another width, or it is neither in the spectra nor among the targets
            that no batch reached, or the spectra were measured on another model.
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
    if not force and is_other_model(spectra.weights, model):
        raise EvaError(
            f"the spectra were measured on another model ({spectra.model_name or 'without a name'}): the weights "
            "differ; measure this model, or take them all the same with force=True (--force)."
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


def check_has_no_others(plan: RankPlan, targets: Collection[str], *, plan_name: str = "") -> None:
    """Check that a plan is of these targets, or of some of them; `plan_name` names its file.

    Raises:
        EvaError: it has layers that are no targets.
    """
    others = [name for name in plan.ranks if name not in targets]
    if others:
        raise _of_other_layers(plan_name, "has layers that the adapter has not", others)


def _of_other_layers(plan_name: str, what: str, names: Sequence[str]) -> EvaError:
    return EvaError(
        f"the plan {plan_name and f'{plan_name} '}{what} ({len(names)}, the first {names[0]!r}); plan again with "
        "spectra of this model and these target_modules."
    )


def check_plan(plan: RankPlan, spectra: Spectra, *, use_rslora: bool) -> None:
    """Check that a plan that was made before can decide the ranks of an adapter.

    Args:
        plan: the plan.
        spectra: of the adapter's layers, and of no others.
        use_rslora: whether the adapter is scaled by alpha / √r.

    Raises:
        EvaError: it is of other layers, of another scale, or has more components than were kept.
    """
    check_has_no_others(plan, spectra.targets)
    missing = [name for name in spectra.targets if name not in plan.ranks]
    if missing:
        raise _of_other_layers("", "lacks layers of the adapter", missing)
    if plan.use_rslora != use_rslora:
        raise EvaError(
            f"the plan's alphas are for use_rslora={plan.use_rslora}, the adapter has use_rslora={use_rslora}; plan "
            "again with that setting, or take a method with or without rslora."
        )
    for name, rank in plan.ranks.items():
        n_kept = len(spectra[name].components)
        if rank > n_kept:
            raise EvaError(
                f"the plan gives {name!r} rank {rank}, but {n_kept} components were kept of its input; measure with "
                f"n_components={max(plan.ranks.values())}."
            )
