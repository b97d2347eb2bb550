"""PEFT's own call for EVA, `initialize_lora_eva_weights`, with the same arguments, done by evatune.

A script that calls PEFT's function needs no other change than its import:

    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0), target_modules="all-linear")
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, dataloader)

The settings of `EvaConfig` apply. What PEFT saves of EVA (`get_eva_state_dict`) is one matrix for each layer: as many
rows of A as the layer's rank. It holds neither variances nor further components, so it can start an adapter with
exactly these ranks only. A plan with another rank, rho or metric needs `evatune.Spectra`.
"""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import (
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from evatune.activations import measure
from evatune.adapters.all_or_nothing import all_or_nothing
from evatune.adapters.fresh import Fresh, fresh_adapter
from evatune.adapters.initialize import apply_plan, start
from evatune.allocation import RankPlan
from evatune.errors import EvaError, EvaWarning
from evatune.settings import IGNORED_LABEL, Measuring
from evatune.spectra import Spectra

_PREFIX = "base_model.model."


def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | str | Path | None = None,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    prepare_model_inputs_fn: Any = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> RankPlan:
    """Initialize a LoRA adapter with EVA, with the settings of the `EvaConfig` in its configuration.

    Args:
        model: what `peft.get_peft_model` returned.
        dataloader: batches as the model takes them, iterated once; or spectra that were measured before.
        eva_state_dict: instead of batches, what PEFT's `get_eva_state_dict` returned, or the file with it.
        forward_fn: calls the model with a batch.
        prepare_model_inputs_fn: PEFT's own, or None. Which rows count is found by evatune's rules (docs/measuring.md).
        prepare_layer_inputs_fn: PEFT's own, or None.
        adapter_name: the adapter.
        gather_distributed_inputs: ignored: processes exchange small matrices and never activations.
        show_progress_bar: show a bar.

    Returns:
        The plan that was applied.

    Raises:
        EvaError: neither batches nor a dictionary, functions of your own for rows, or what `evatune.initialize` raises.
    """
    fresh = fresh_adapter(model, adapter_name)
    eva_config = fresh.config.eva_config or EvaConfig()
    if eva_state_dict is not None:
        matrices = eva_state_dict if isinstance(eva_state_dict, Mapping) else _read(Path(eva_state_dict))
        return _start_from(fresh, matrices, eva_config)
    if dataloader is None:
        raise EvaError("initialize_lora_eva_weights needs a dataloader or an eva_state_dict, and got neither.")
    own = (prepare_model_inputs_fn_language_modeling, prepare_layer_inputs_fn_language_modeling, None)
    if prepare_model_inputs_fn not in own or prepare_layer_inputs_fn not in own:
        raise EvaError(
            "evatune finds by itself which rows count, so it takes no prepare_model_inputs_fn and no "
            "prepare_layer_inputs_fn; leave them out, or call evatune.initialize(model, batches, row_mask=...)."
        )
    spectra = dataloader
    if not isinstance(spectra, Spectra):
        batches, has_labels = _with_ignored(spectra, eva_config.label_mask_value)
        spectra = measure(
            fresh.model,
            batches,
            forward=forward_fn,
            progress=show_progress_bar,
            tau=eva_config.tau or None,
            use_label_mask=eva_config.use_label_mask and has_labels and prepare_model_inputs_fn is not None,
            rho=eva_config.rho,
            **fresh.measuring(),
        )
    return start(
        fresh,
        spectra,
        settings=Measuring(rho=eva_config.rho),
        whiten=eva_config.whiten,
        keep_scale=eva_config.adjust_scaling_factors,
        warn=isinstance(dataloader, Spectra),
    )


def _start_from(fresh: Fresh, matrices: Mapping[str, Tensor], eva_config: EvaConfig) -> RankPlan:
    """Start an adapter from the rows of A that PEFT has saved."""
    down, ranks = _down_of(fresh, matrices), fresh.ranks
    new = {name: len(matrix) for name, matrix in down.items()}
    power = 0.0 if not eva_config.adjust_scaling_factors else 0.5 if fresh.config.use_rslora else 1.0
    plan = RankPlan(
        ranks=new,
        alphas={name: float(fresh.alphas[name] * (rank / ranks[name]) ** power) for name, rank in new.items()},
        base_ranks={name: ranks[name] for name in new},
        explained={},
        in_features={name: fresh.widths[name] for name in new},
        out_features=fresh.out_features,
        rho=float(eva_config.rho),
        metric="ratio",
        use_rslora=fresh.config.use_rslora,
        train_a=fresh.trains_a,
    )
    with all_or_nothing(fresh.model):
        apply_plan(fresh.model, plan, down=down, adapter_name=fresh.name)
    return plan


def _down_of(fresh: Fresh, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows of A of this adapter's layers, after a warning that names what is missing."""
    named = {name.removeprefix(_PREFIX): matrix for name, matrix in matrices.items()}
    widths = fresh.widths
    down = {name: named[name] for name in widths if name in named}
    if not down:
        raise EvaError(
            f"the eva_state_dict has no layer of this adapter: it begins with {next(iter(named), None)!r}, the adapter "
            f"with {next(iter(widths))!r}."
        )
    for name, matrix in down.items():
        if matrix.ndim != 2 or matrix.shape[1] != widths[name]:
            raise EvaError(
                f"the eva_state_dict has a matrix of shape {tuple(matrix.shape)} for {name!r}, whose input has "
                f"{widths[name]} features; it is of another model."
            )
    without = [name for name in widths if name not in down]
    if without:
        warnings.warn(
            f"{len(without)} of {len(widths)} layers are not in the eva_state_dict and start as LoRA does, with its "
            f"rank and a random A, the first is {without[0]!r}.",
            EvaWarning,
            stacklevel=4,
        )
    return down


def _read(path: Path) -> dict[str, Tensor]:
    """Return the matrices in a file written by `torch.save` or safetensors; only tensors are unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise EvaError(f"{path} holds no eva_state_dict that can be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise EvaError(f"{path} holds a {type(content).__name__} and no eva_state_dict, which maps names to matrices.")
    return dict(content)


def _with_ignored(batches: Iterable[Any], ignored: int) -> tuple[Iterable[Any], bool]:
    """Return batches with the label `ignored` replaced by the one that losses ignore, and whether they have labels."""
    rest = iter(batches)
    first = list(itertools.islice(rest, 1))
    has_labels = any(isinstance(batch, Mapping) and batch.get("labels") is not None for batch in first)

    def relabelled() -> Iterator[Any]:
        for batch in itertools.chain(first, rest):
            labels = batch.get("labels") if isinstance(batch, Mapping) else None
            if labels is not None and ignored != IGNORED_LABEL:
                batch = {**batch, "labels": labels.masked_fill(labels == ignored, IGNORED_LABEL)}
            yield batch

    return relabelled(), has_labels
