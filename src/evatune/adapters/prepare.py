"""`evatune.prepare`: every method behind one door."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from torch import nn

from evatune.activations.gradients import Loss
from evatune.activations.layers.heads import find_heads
from evatune.activations.layers.targets import TargetModule, TargetRules, find_targets
from evatune.activations.preserve import preserved_random_state
from evatune.adapters import starts
from evatune.adapters.base_change import copy_weights, take_out
from evatune.adapters.factors import factors_of
from evatune.adapters.four_bits import quantize_targets
from evatune.adapters.lora import find_adapter
from evatune.adapters.starts import Preparation
from evatune.adapters.wrap import wrap
from evatune.errors import EvaError
from evatune.methods import Choice, check_train_a, parse_method
from evatune.spectra import Spectra


def prepare(
    model: Any,
    *,
    method: str = "eva",
    rank: int = 16,
    batches: Iterable[Any] | Spectra | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    lora_alpha: float = 1.0,
    rho: float = 2.0,
    metric: str = "ratio",
    budget: str = "components",
    lora_dropout: float = 0.0,
    train_a: bool = True,
    total_steps: int | None = None,
    spectra: Spectra | None = None,
    gradient_batches: int = 8,
    loss: Loss | None = None,
    block_size: int = 4,
    bias: str = "none",
    modules_to_save: Sequence[str] | None = None,
    task_type: str | None = None,
    keep_base: bool = True,
    seed: int = 0,
    **measure_options: Any,
) -> Any:
    """Make a model ready for fine-tuning by any method.

    Methods that start from A and B with B A ≠ 0 take that product out of the base weights, so that the outputs stay
    the base model's (LoRA-One alone does not: its start is a step). Save such models with
    `evatune.adapters.save_adapter`, which writes an adapter for the untouched base model, and take the adapter off with
    `evatune.adapters.unload`.

    Args:
        model: a torch model without adapter; it is changed in place, as PEFT does.
        method: a name from `evatune.methods.METHODS`, with options behind a plus: `eva+dora`, `pissa+rslora`.
        rank: rank of every target before redistribution; AdaLoRA's final average.
        batches: what the data-driven methods look at, as the model takes it (with labels for lora-ga, lora-one and
            eva-grad); gone through once. Spectra measured before are taken too.
        target_modules: names, a regular expression, or "all-linear", as in PEFT's `LoraConfig`.
        exclude_modules: names or a regular expression of what is left out.
        lora_alpha: scale of the adapter.
        rho: EVA gives a target at most round(rho * rank) components; 1 keeps ranks uniform.
        metric: how EVA compares components, see `Spectra.plan`.
        budget: what EVA redistributes, "components" or trainable "parameters", which are those of `B` alone with
            `train_a=False`.
        lora_dropout: dropout before the adapter.
        train_a: train `A` as well as `B`; False freezes it where it starts.
        total_steps: optimizer steps of the training to come; AdaLoRA's schedule needs it.
        spectra: measured before, instead of measuring now.
        gradient_batches: how many batches lora-ga, lora-one and eva-grad take gradients of.
        loss: computes the loss of a batch from model and batch, where the model's own does not do.
        block_size: BOFT's block size.
        bias: "all" trains and saves the biases of the whole model too, which changes the base model.
        modules_to_save: further modules that are trained and saved whole, such as a new head.
        task_type: PEFT's task type.
        keep_base: keep the base weights that a method changes in main memory, so that `unload` can put them back.
        seed: of everything random.
        measure_options: passed to `evatune.measure` (`max_batches`, `tau`, `use_label_mask`, ...).

    Returns:
        The PEFT model; for `full` the model itself, all parameters trainable.

    Raises:
        EvaError: an unknown or senseless method, missing batches or steps, no matching target, or a value out of range.
            The model is as it was then, but for `qlora`, which has quantized it when batches turn out to be bad.

    Cost: see the page of each method in `docs/methods`.

    Example:
        >>> model = evatune.prepare(base, method="eva+dora", rank=16, batches=loader)  # doctest: +SKIP
    """
    choice = parse_method(method)
    if isinstance(batches, Spectra):
        batches, spectra = None, batches
    _check(
        model,
        choice,
        rank=rank,
        batches=batches,
        spectra=spectra,
        train_a=train_a,
        total_steps=total_steps,
        measure_options=measure_options,
    )
    if not choice.method.peft_config:
        model.requires_grad_(True)
        return model
    rules = TargetRules(target_modules=target_modules, exclude_modules=exclude_modules)
    targets = find_targets(model, rules)
    _check_targets(choice, targets, rank)
    heads = [
        name
        for name, is_new in find_heads(model).items()
        if is_new
        and not rules.excludes(name)
        and not any(t.name == name or t.name.startswith(f"{name}.") for t in targets)
    ]
    config = _config(
        choice,
        r=rank,
        lora_alpha=lora_alpha,
        dropout=lora_dropout,
        total_steps=total_steps,
        block_size=block_size,
        bias=bias,
        modules_to_save=[*dict.fromkeys([*(modules_to_save or ()), *heads])] or None,
        task_type=task_type,
        seed=seed,
    )
    originals = copy_weights(model, [target.name for target in targets]) if choice.method.changes_base else {}
    with preserved_random_state():
        torch.manual_seed(seed)
        if "qlora" in choice.options:
            quantize_targets(model, target_modules=target_modules, exclude_modules=exclude_modules)
            targets = find_targets(model, rules)
        finish = None
        if choice.method.start:
            preparation = Preparation(
                model=model,
                targets=targets,
                config=config,
                rank=rank,
                lora_alpha=lora_alpha,
                rho=rho,
                metric=metric,
                budget=budget,
                train_a=train_a,
                batches=batches,
                spectra=spectra,
                gradient_batches=gradient_batches,
                loss=loss,
                seed=seed,
                measure_options=measure_options,
            )
            finish = getattr(starts, choice.method.start)(preparation, **choice.method.options)
        with _restored_on_failure(model, originals):
            with _peft_errors(choice), _quiet_corrections():
                peft_model: Any = wrap(model, config, targets)
            if finish is not None:
                finish(peft_model)
            if originals:
                take_out(peft_model, originals, method=choice.method.name, keep_base=keep_base)
    if not train_a:
        freeze_a(peft_model)
    return peft_model


def freeze_a(peft_model: Any, adapter_name: str = "default") -> None:
    """Train `B` only, beside an `A` that stays as it started. Saved adapters do not remember it: freeze after loading.

    Args:
        peft_model: the model that carries the adapter.
        adapter_name: the adapter.

    Raises:
        EvaError: no LoRA adapter of that name, or an `A` that is zero, beside which `B` would never learn.
    """
    _, _, layers = find_adapter(peft_model, adapter_name)
    frozen = []
    for name, layer in layers.items():
        for pair in factors_of(layer, adapter_name):
            weight = pair.down_weight
            if not weight.is_meta and not weight.any():
                raise EvaError(
                    f"A of {name!r} is zero, as PEFT starts it on embeddings; frozen, it would keep B from learning: "
                    "start from a method that fills it, such as eva, or leave the module out with exclude_modules."
                )
            frozen.append(weight)
    for weight in frozen:
        weight.requires_grad_(False)


def _check(
    model: Any,
    choice: Choice,
    *,
    rank: Any,
    batches: Any,
    spectra: Any,
    train_a: bool,
    total_steps: Any,
    measure_options: Any,
) -> None:
    method = choice.method
    if not isinstance(model, nn.Module):
        raise EvaError(f"a torch model is needed, got {type(model).__name__}.")
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise EvaError("the model has an adapter already; give evatune.prepare the base model.")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise EvaError(f"rank must be a whole number of at least 1, got {rank!r}.")
    if spectra is not None and not method.needs_spectra:
        raise EvaError(f"method {choice.name!r} has no use for spectra; leave them out.")
    if method.needs_batches and batches is None and spectra is None:
        what = "batches or spectra" if method.needs_spectra else "batches"
        raise EvaError(f"method {choice.name!r} looks at data before training: pass {what} (batches=loader).")
    if measure_options and not method.needs_batches:
        raise EvaError(
            f"{', '.join(sorted(measure_options))}: prepare has no such argument, and method {choice.name!r} "
            "measures nothing."
        )
    if method.peft_config == "AdaLoraConfig" and (total_steps is None or total_steps < 4):
        raise EvaError(
            f"adalora's schedule needs the number of optimizer steps, at least 4: total_steps={total_steps!r}."
        )
    check_train_a(choice, train_a=train_a)


_TRIPLES = {"pissa": 1, "milora": 1, "olora": 1, "corda": 1, "lora-one": 1, "lora-ga": 2}
"""How many singular vectors of the weight or its gradient one rank takes."""


def _check_targets(choice: Choice, targets: Sequence[TargetModule], rank: int) -> None:
    method = choice.method
    needed = _TRIPLES.get(method.name, 0) * rank
    for target in targets:
        is_matrix = isinstance(target.module, nn.Linear) or type(target.module).__name__ == "Conv1D"
        if (method.changes_base or method.needs_gradients) and not is_matrix:
            raise EvaError(
                f"method {choice.name!r} works on linear layers, and {target.name!r} is a "
                f"{type(target.module).__name__}; leave it out with exclude_modules."
            )
        smaller = min(target.in_features, target.out_features)
        if needed > smaller:
            raise EvaError(
                f"rank {rank} is too large for method {choice.name!r} on {target.name!r}: it takes {needed} singular "
                f"vectors of {smaller}; take a smaller rank or leave the module out with exclude_modules."
            )
        if method.name in ("olora", "boft") and not isinstance(target.module, nn.Linear):
            raise EvaError(
                f"{target.name!r} is a {type(target.module).__name__}, which PEFT's {method.name} cannot "
                "adapt; take another method."
            )


def _config(choice: Choice, **given: Any) -> Any:
    """Return the PEFT configuration of a method, whose targets `wrap` writes into it."""
    method, rank = choice.method, given["r"]
    common = {name: given[name] for name in ("modules_to_save", "task_type", "bias")}
    with _peft_errors(choice):
        if method.peft_config == "VeraConfig":
            return peft.VeraConfig(r=rank, vera_dropout=given["dropout"], projection_prng_key=given["seed"], **common)
        if method.peft_config == "BOFTConfig":
            return peft.BOFTConfig(
                boft_block_size=given["block_size"], boft_n_butterfly_factor=2, boft_dropout=given["dropout"], **common
            )
        lora = common | {"lora_alpha": given["lora_alpha"], "lora_dropout": given["dropout"]}
        if method.peft_config == "AdaLoraConfig":
            steps = given["total_steps"]
            # The EVA paper starts AdaLoRA at rank r + 4 (Appendix C).
            return peft.AdaLoraConfig(
                init_r=rank + 4, target_r=rank, total_step=steps, tinit=steps // 10, tfinal=max(1, steps // 4), **lora
            )
        settings = dict(method.settings)
        if method.name == "corda":
            settings["corda_config"] = CordaConfig()
        if method.name == "lora-ga":
            settings["lora_ga_config"] = LoraGAConfig()
        return LoraConfig(
            r=rank, use_rslora="rslora" in choice.options, use_dora="dora" in choice.options, **lora, **settings
        )


@contextlib.contextmanager
def _peft_errors(choice: Choice) -> Iterator[None]:
    try:
        yield
    except EvaError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise EvaError(f"PEFT cannot do {choice.name!r} here: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _quiet_corrections() -> Iterator[None]:
    """Silence what PEFT says of what it corrects by itself, such as the layout of GPT-2's Conv1D."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Failed to load the CUDA extension")  # BOFT's, in each layer
        warnings.filterwarnings("ignore", message="Setting boft_n_butterfly_factor to 1")
        yield


@contextlib.contextmanager
def _restored_on_failure(model: nn.Module, originals: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put the base weights back if PEFT fails half-way."""
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in originals}
    try:
        yield
    except Exception:
        for name, weight in weights.items():
            weight.data = originals[name].to(weight.device)
        raise
