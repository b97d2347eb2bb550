"""What each method does around `get_peft_model`, where its PEFT configuration alone does not do it.

Every start is a function of a `Preparation`. It looks at the bare model and the batches, raises what there is to raise,
and returns what remains to do on the PEFT model, or None. `evatune.methods.METHODS` names them.
"""

from __future__ import annotations

import itertools
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from evatune.activations import measure
from evatune.activations.batches import forward_arguments
from evatune.activations.gradients import (
    Loss,
    batch_loss,
    first_batches,
    output_gradient_energy,
    weight_gradients,
)
from evatune.activations.layers.targets import TargetModule
from evatune.activations.preserve import measuring_state, preserved_random_state
from evatune.adapters.initialize import apply_plan, check_same_targets
from evatune.adapters.lora import down_up, find_adapter
from evatune.errors import EvaError
from evatune.initialization import eva as eva_rows
from evatune.initialization import eva_minor as eva_minor_rows
from evatune.initialization import lora_one as lora_one_start
from evatune.initialization import milora as milora_start
from evatune.initialization import permuted, random_rows, rotated, shuffled
from evatune.spectra import Spectra, Spectrum

Finish = Callable[[PeftModel], None]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a start has to work with."""

    model: nn.Module
    """The base model."""
    targets: Sequence[TargetModule]
    """The modules that get the adapter."""
    config: Any
    """The PEFT configuration."""
    rank: int
    """Rank of every target."""
    lora_alpha: float
    """Scale of the adapter."""
    rho: float = 2.0
    """A target gets at most round(rho * rank) components."""
    metric: str = "ratio"
    """How components of different targets compare."""
    budget: str = "components"
    """What is redistributed: components or trainable parameters."""
    train_a: bool = True
    """Whether A will be trained, and so counts as trainable."""
    batches: Iterable[Any] | None = None
    """Batches as the model takes them."""
    spectra: Spectra | None = None
    """What was measured before."""
    gradient_batches: int = 8
    """How many batches gradients are taken of."""
    loss: Loss | None = None
    """Computes the loss of a batch, where the model itself does not."""
    seed: int = 0
    """Of everything random."""
    measure_options: Mapping[str, Any] = field(default_factory=dict)
    """Passed to `evatune.measure`."""

    @property
    def scaling(self) -> float:
        """The factor on B A at uniform ranks."""
        return self.lora_alpha / (self.rank**0.5 if self.config.use_rslora else self.rank)

    def pattern(self) -> str:
        """Return one regular expression that matches exactly the targets."""
        return "|".join(re.escape(target.name) for target in self.targets)

    def measured(self, **options: Any) -> Spectra:
        """Return the spectra that were given, or measure the targets.

        Args:
            options: of `evatune.measure`; what the caller of `prepare` passed comes before them.
        """
        if self.spectra is None:
            ours: dict[str, Any] = {"rho": self.rho, "metric": self.metric, "seed": self.seed}
            options = ours | options | dict(self.measure_options)
            spectra = measure(self.model, _given(self.batches), target_modules=self.pattern(), **options)
        else:
            spectra = self.spectra
        check_same_targets(spectra, {target.name: target.in_features for target in self.targets})
        return spectra


def eva(p: Preparation, *, metric: str | None = None, rows: str = "components") -> Finish:
    """EVA: ranks by explained variance, `A` from the components, B = 0. Its ablations differ in metric or rows."""
    if metric is not None and p.metric not in ("ratio", metric):
        raise EvaError(
            f"this method compares components by metric {metric!r}; leave out metric={p.metric!r} or take `eva`."
        )
    p = replace(p, metric=metric or p.metric)
    return _redistribute(p, p.measured(rank=p.rank), rows=rows)


def eva_grad(p: Preparation) -> Finish:
    """Gradient-aware EVA: components compete by their variance times the energy of the gradient at the output.

    Where input x and output gradient g of a target are uncorrelated, E‖∂L/∂B‖² of the component v is E‖g‖² E(v·x)², so
    that these ranks have the largest expected gradient of B at the first step that the budget allows.
    """
    if p.metric != "ratio":
        raise EvaError(
            f"eva-grad compares components by variance times gradient energy; leave out metric={p.metric!r}."
        )
    if p.batches is None:
        raise EvaError("eva-grad needs batches with labels, also where spectra are given: pass batches=….")
    batches = iter(p.batches)
    first = list(itertools.islice(batches, p.gradient_batches))
    energy = output_gradient_energy(p.model, first, targets=p.targets, n_batches=p.gradient_batches, loss=p.loss)
    if not any(energy.values()):
        raise EvaError("no gradient arrives at any target: the loss does not depend on them.")
    p = replace(p, metric="raw", batches=itertools.chain(first, batches))
    return _redistribute(p, p.measured(rank=p.rank), rows="components", weights=energy)


def eva_minor(p: Preparation) -> Finish:
    """EVA-minor: uniform ranks, `A` from the last of all components, by default of 20 batches as in the paper."""
    widest = max(target.in_features for target in p.targets)
    needs_all = {"n_components": widest, "backend": "exact", "tau": None, "min_gain": None, "max_batches": 20}
    p = replace(p, rho=1.0)
    return _redistribute(p, p.measured(**needs_all), rows="minor")


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
"""How the rows of `A` come from a spectrum, a rank and a seed."""


def _redistribute(p: Preparation, spectra: Spectra, *, rows: str, weights: Mapping[str, float] | None = None) -> Finish:
    plan = spectra.plan(
        p.rank,
        p.rho,
        metric=p.metric,
        lora_alpha=p.lora_alpha,
        use_rslora=p.config.use_rslora,
        budget=p.budget,
        train_a=p.train_a,
        weights=weights,
    )
    down = {
        # One seed a target: targets with a shared input are to differ.
        name: _ROWS[rows](spectra[name], rank, zlib.crc32(f"{p.seed} {name}".encode()))
        for name, rank in plan.ranks.items()
    }
    return lambda peft_model: apply_plan(peft_model, plan, down=down)


def milora(p: Preparation) -> Finish:
    """MiLoRA: see `evatune.initialization.milora`."""
    return _write({target.name: milora_start(_weight(target), p.rank, scaling=p.scaling) for target in p.targets})


def lora_one(p: Preparation, *, step: float = 1 / 128) -> Finish:
    """LoRA-One: see `evatune.initialization.lora_one`."""
    gradients = weight_gradients(
        p.model, _given(p.batches), targets=p.targets, n_batches=p.gradient_batches, loss=p.loss
    )
    return _write(
        {name: lora_one_start(gradient, p.rank, scaling=p.scaling, step=step) for name, gradient in gradients.items()}
    )


def corda(p: Preparation) -> None:
    """CorDA: PEFT's preprocessing, which takes one example at a time; padding is left out."""
    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ModuleNotFoundError as error:  # PEFT imports attrs here without depending on it
        raise EvaError(f"corda needs the module {error.name}, which is not installed: pip install attrs.") from None

    def run() -> None:
        for batch in first_batches(_given(p.batches), p.measure_options.get("max_batches", 64)):
            for example in _examples(batch):
                args, kwargs = forward_arguments(p.model, example, keep_labels=False)
                p.model(*args, **kwargs)

    with torch.no_grad(), preserved_random_state(), measuring_state(p.model):
        _preprocess(p, lambda config, once: preprocess_corda(p.model, config, run_model=once), run=run)


def lora_ga(p: Preparation) -> None:
    """LoRA-GA: PEFT's preprocessing, on the mean gradient of the first batches."""

    def run() -> None:
        p.model.eval()  # PEFT has switched dropout on
        for batch in first_batches(_given(p.batches), p.gradient_batches):
            (p.loss or batch_loss)(p.model, batch).backward()

    with preserved_random_state(), measuring_state(p.model), warnings.catch_warnings():
        # PEFT counts by hooks on modules whose input needs no gradient; torch warns of these.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        _preprocess(p, lambda config, once: preprocess_loraga(p.model, config, train_step=once), run=run)


_LEFT_BY_PEFT = ("eigens", "sample_count", "covariance_matrix", "corda_method", "rank", "_peft_loraga_grad")


def _preprocess(
    p: Preparation, preprocess: Callable[[LoraConfig, Callable[[], None]], None], *, run: Callable[[], None]
) -> None:
    """Let PEFT preprocess exactly the targets; if that fails, take its hooks and what it left on the modules away."""
    failures: list[Exception] = []

    def once() -> None:
        try:
            run()
        except Exception as error:  # PEFT removes its hooks only if this function returns
            failures.append(error)

    try:
        preprocess(replace(p.config, target_modules=p.pattern(), exclude_modules=None), once)
    except Exception as error:
        failures.append(error)
    if failures:
        for target in p.targets:
            for attribute in _LEFT_BY_PEFT:
                target.module.__dict__.pop(attribute, None)
        if isinstance(failures[0], EvaError):
            raise failures[0]
        raise EvaError(f"PEFT's preprocessing failed: {failures[0]}") from failures[0]


def _examples(batch: Any) -> Iterator[Any]:
    """Split sequences and images into examples, without padding; vectors of shape (rows, features) stay whole.

    PEFT takes the first dimension away where it is 1 and wants (rows, features) then.
    """
    if not isinstance(batch, Mapping):
        batch = batch[0] if isinstance(batch, tuple | list) else batch
        yield from batch.split(1) if isinstance(batch, Tensor) and batch.ndim > 2 else [batch]
        return
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    inputs = [value for name, value in tensors.items() if name != "labels"]
    if all(value.ndim == 2 and value.is_floating_point() for value in inputs):
        yield batch
        return
    mask = tensors.get("attention_mask")
    for i in range(len(next(iter(tensors.values())))):
        example = {name: value[i : i + 1] for name, value in tensors.items()}
        if mask is not None and mask.ndim == 2:
            keep = mask[i].bool()
            example = {
                name: value[:, keep] if value.shape[:2] == (1, len(keep)) else value for name, value in example.items()
            }
        yield example


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


def _given(batches: Iterable[Any] | None) -> Iterable[Any]:
    assert batches is not None  # `prepare` has checked
    return batches
