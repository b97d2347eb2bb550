"""Checks that an adapter that should start from EVA does so: PEFT alone starts it at random without a warning."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from evatune.adapters.factors import factors_of
from evatune.adapters.lora import find_adapter
from evatune.allocation import RankPlan
from evatune.errors import EvaError


def initialized_plan(peft_model: Any, adapter_name: str = "default") -> RankPlan | None:
    """Return the plan that `initialize` applied to this adapter in this process, or None.

    Raises:
        EvaError: no PEFT model, or no LoRA adapter of that name.
    """
    model, config, _ = find_adapter(peft_model, adapter_name)
    # An adapter that was deleted and made again under the same name has another config object.
    applied_to, plan = _plans(model).get(adapter_name, (None, None))
    return plan if applied_to is config else None


def require_initialized(peft_model: Any, adapter_name: str = "default", *, asked: bool | None = None) -> None:
    """Check, before training, that an adapter that should start from EVA does so.

    For `init_lora_weights="eva"` PEFT itself makes a random `A` and waits for a second call; without that call,
    training starts from random directions and says nothing.

    Args:
        peft_model: the model that is about to be trained.
        adapter_name: the adapter that is about to be trained.
        asked: whether EVA was asked for; None reads it from the adapter's config (`init_lora_weights="eva"` or an
            `eva_config`).

    Raises:
        EvaError: EVA was asked for, no plan was applied, `B` is zero everywhere, and `A` does not consist of
            components. (In an initial adapter that was loaded from disk it does.)
    """
    model, config, layers = find_adapter(peft_model, adapter_name)
    if asked is None:
        asked = config.init_lora_weights == "eva" or config.eva_config is not None
    if not asked or initialized_plan(model, adapter_name) is not None:
        return
    if any(is_trained(layer, adapter_name) for layer in layers.values()):
        return
    blocks = [block for layer in layers.values() for pair in factors_of(layer, adapter_name) for block in pair.blocks()]
    if blocks and all(map(_has_orthogonal_rows, blocks)):
        return
    raise EvaError(
        f"adapter {adapter_name!r} is to start from EVA but was never initialized, so its A is random; "
        "call evatune.initialize(model, batches) before training, or ask for init_lora_weights=True."
    )


def note_plan(model: PeftModel, adapter_name: str, config: LoraConfig, plan: RankPlan) -> None:
    """Note that a plan was applied to an adapter; `config` is its configuration since then."""
    vars(model.base_model)["_evatune_plans"] = {**_plans(model), adapter_name: (config, plan)}


def is_trained(layer: LoraLayer, adapter_name: str) -> bool:
    """Tell whether the adapter changes anything; PEFT starts embeddings from A = 0, all else from B = 0."""
    pairs = [pair for pair in factors_of(layer, adapter_name) if not pair.up_weight.is_meta]
    return any(bool(pair.up_weight.any()) and bool(pair.down_weight.any()) for pair in pairs)


def _plans(model: PeftModel) -> dict[str, tuple[LoraConfig, RankPlan]]:
    return vars(model.base_model).get("_evatune_plans", {})


def _has_orthogonal_rows(A_rd: Tensor) -> bool:
    """Tell whether A consists of components, whitened or not, and not of random rows; a single row by its length."""
    if A_rd.is_meta:
        return False
    rows = A_rd.detach().float()
    rows = rows[rows.any(dim=1)]  # in a narrow part of a stacked input, later pieces are zero
    if not len(rows):
        return False
    lengths = rows.norm(dim=1, keepdim=True)
    if len(rows) == 1:
        return bool((lengths - 1).abs() < 1e-2)
    rows = rows / lengths
    return bool((rows @ rows.T - torch.eye(len(rows), device=rows.device)).abs().max() < 1e-2)
