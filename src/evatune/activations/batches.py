"""Turn whatever a loader yields into the arguments of a forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evatune.errors import EvaError


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model: that of its first parameter with values."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def forward_arguments(model: nn.Module, batch: Any, *, keep_labels: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments with which a batch enters a model.

    Args:
        model: the base model.
        batch: a mapping (entries that the model's `forward` does not take and texts are left out), a tuple or list
            whose first element is a mapping or a tensor of inputs (the rest are labels), or a tensor.
        keep_labels: pass `labels` on; encoder-decoder models make their decoder's input from them. Otherwise they are
            left out, so that no loss is computed.

    Raises:
        EvaError: the batch is none of these, or shares no entry with `forward`.
    """
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    device = device_of(model)
    if isinstance(batch, Tensor):
        return (batch.to(device, non_blocking=True),), {}
    if not isinstance(batch, Mapping):
        raise EvaError(
            f"a batch must be a mapping, a tensor or a tuple that starts with one, got {type(batch).__name__}; "
            "pass forward=lambda model, batch: … for anything else."
        )
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = {}
    for name, value in batch.items():
        is_text = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str))
        if is_text or not (takes_any or name in parameters) or (name == "labels" and not keep_labels):
            continue
        arguments[name] = value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
    if not arguments:
        raise EvaError(
            f"the batch has {', '.join(map(repr, batch)) or 'no entries'}, but the model's forward takes "
            f"{', '.join(list(parameters)[:6])}, …; rename the entries or pass forward=."
        )
    if "use_cache" in parameters:
        arguments.setdefault("use_cache", False)
    return (), arguments
