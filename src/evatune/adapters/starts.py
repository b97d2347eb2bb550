"""What each method does before and after `get_peft_model`, if its PEFT configuration alone is not enough.

Every start is a function of a `Preparation`. It uses the model without adapter and the batches, raises all its errors,
and returns a function for what remains to do on the PEFT model, or None. The rows of `evatune.methods.METHODS` point to
them.
"""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from evatune.activations.gradients import batch_loss, first_batches, output_gradient_energy, weight_gradients
from evatune.activations.layers.targets import TargetModule
from evatune.activations.preserve import measuring_state, preserved_random_state
from evatune.adapters.fit import Fit, check_plan
from evatune.adapters.initialize import apply_plan
from evatune.adapters.lora import down_up, find_adapter
from evatune.adapters.preparation import Finish, Preparation, preprocessing
from evatune.errors import EvaError
from evatune.initialization import eva as eva_rows
from evatune.initialization import eva_minor as eva_minor_rows
from evatune.initialization import lora_one as lora_one_start
from evatune.initialization import milora as milora_start
from evatune.initialization import permuted, random_rows, rotated, shuffled
from evatune.settings import Planning
from evatune.spectra import Spectrum


def eva(p: Preparation, *, metric: str | None = None, rows: str = "components") -> Finish:
    """EVA: ranks by explained variance, `A` from the components, B = 0. Its ablations differ in metric or rows."""
    given = p.settings.metric
    if metric is not None and given not in ("ratio", metric):
        raise EvaError(
            f"this method compares components by metric {metric!r}; leave out metric={given!r} or take `eva`."
        )
    return _redistribute(p, p.measured(metric=metric or given), rows=rows, metric=metric or given)


def eva_grad(p: Preparation) -> Finish:
    """Gradient-aware EVA: components compete by their variance times the energy of the gradient at the output.

    If ‖g‖² and (v·x)² are uncorrelated, for the input x and output gradient g of a target, E‖∂L/∂B‖² of the
    component v is E‖g‖² E(v·x)². So, among all ranks that the budget allows, these have the largest expected gradient
    of B at the first step.
    """
    if p.settings.metric != "ratio":
        raise EvaError(
            f"eva-grad compares components by variance times gradient energy; leave out metric={p.settings.metric!r}."
        )
    if p.batches is None:
        raise EvaError("eva-grad needs batches with labels, also where spectra are given: pass batches=….")
    batches = iter(p.batches)
    n_batches = p.settings.gradient_batches
    first = list(itertools.islice(batches, n_batches))
    energy = output_gradient_energy(p.model, first, targets=p.targets, n_batches=n_batches, loss=p.loss)
    if not any(energy.values()):
        raise EvaError("no gradient arrives at any target: the loss does not depend on them.")
    p = replace(p, batches=itertools.chain(first, batches))
    return _redistribute(p, p.measured(metric="raw"), rows="components", metric="raw", weights=energy)


def eva_minor(p: Preparation) -> Finish:
    """EVA-minor: uniform ranks, `A` from the components of least variance."""
    widest = max(target.in_features for target in p.targets)
    fit = p.measured(n_components=widest, rank=None)
    return _redistribute(p, fit, rows="minor", metric=p.settings.metric, rho=1.0)


_ROWS: dict[str, Callable[[Spectrum, int, int], Tensor]] = {
    "components": lambda spectrum, rank, seed: eva_rows(spectrum.components, rank),
    "whitened": lambda spectrum, rank, seed: eva_rows(
        spectrum.components, rank, singular_values=spectrum.singular_values, whiten=True
    ),
    "rotated": lambda spectrum, rank, seed: rotated(eva_rows(spectrum.components, rank), seed=seed),
    "permuted": lambda spectrum, rank, seed: permuted(eva_rows(spectrum.components, rank), seed=seed),
    "shuffled": lambda spectrum, rank, seed: shuffled(eva_rows(spectrum.components, rank), seed=seed),
    "random": lambda spectrum, rank, seed: random_rows(rank, spectrum.components.shape[1], seed=seed),
    "minor": lambda spectrum, rank, seed: eva_minor_rows(spectrum.components, rank),
}
"""A function that makes the rows of `A` from a spectrum, a rank and a seed."""


def _redistribute(
    p: Preparation,
    fit: Fit,
    *,
    rows: str,
    metric: str,
    rho: float | None = None,
    weights: Mapping[str, float] | None = None,
) -> Finish:
    spectra, seed = fit.spectra, p.settings.seed
    if p.plan is not None:
        plan = p.plan
        check_plan(plan, spectra, use_rslora=p.config.use_rslora)
    else:
        plan = spectra.plan(
            settings=p.settings.part(Planning),
            metric=metric,
            rho=p.settings.rho if rho is None else rho,
            use_rslora=p.config.use_rslora,
            weights=weights,
        )
    down = {
        # Each target has its own seed, so that targets with a shared input differ.
        name: _ROWS[rows](spectra[name], rank, zlib.crc32(f"{seed} {name}".encode()))
        for name, rank in plan.ranks.items()
    }
    return lambda peft_model: apply_plan(peft_model, plan, down=down)


def milora(p: Preparation) -> Finish:
    """MiLoRA: see `evatune.initialization.milora`."""
    rank = p.settings.rank
    return _write({target.name: milora_start(_weight(target), rank, scaling=p.scaling) for target in p.targets})


def lora_one(p: Preparation, *, step: float = 1 / 128) -> Finish:
    """LoRA-One: see `evatune.initialization.lora_one`."""
    settings = p.settings
    gradients = weight_gradients(
        p.model, p.given_batches(), targets=p.targets, n_batches=settings.gradient_batches, loss=p.loss
    )
    return _write(
        {
            name: lora_one_start(gradient, settings.rank, scaling=p.scaling, step=step)
            for name, gradient in gradients.items()
        }
    )


def lora_ga(p: Preparation) -> None:
    """LoRA-GA: PEFT's preprocessing, on the mean gradient of the first batches."""

    def run() -> None:
        p.model.eval()  # PEFT has switched dropout on
        for batch in first_batches(p.given_batches(), p.settings.gradient_batches):
            (p.loss or batch_loss)(p.model, batch).backward()

    with preprocessing(), preserved_random_state(), measuring_state(p.model), warnings.catch_warnings():
        # PEFT counts with hooks on modules whose input needs no gradient; torch warns of such hooks.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(p.model, replace(p.config, target_modules=p.pattern()), train_step=run)


@torch.no_grad()
def _write_layers(peft_model: PeftModel, starts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    _, _, layers = find_adapter(peft_model, "default")
    for name, layer in layers.items():
        for module, value in zip(down_up(layer, "default"), starts[name], strict=True):
            module.weight.copy_(value)


def _write(starts: Mapping[str, tuple[Tensor, Tensor]]) -> Finish:
    return lambda peft_model: _write_layers(peft_model, starts)


def _weight(target: TargetModule) -> Tensor:
    weight: Any = target.module.weight
    return weight if isinstance(target.module, nn.Linear) else weight.T
