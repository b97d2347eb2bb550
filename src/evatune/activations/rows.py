"""The rows of an activation that count.

Shapes: L leading shape of an activation, d features, n rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from evatune.pca.moving import moved

_PLACES = WeakTensorKeyDictionary()
"""Which rows a mask keeps, (n,), by mask and device: inputs of a batch that have a mask in common share one copy."""


def select(activation: Tensor, *masks: Tensor | None) -> Tensor:
    """Return the rows of an activation that count.

    Args:
        activation: (L, d).
        masks: which rows count, boolean, of its leading shape; None means all.

    Returns:
        Rows, (n, d).
    """
    rows_nd = activation.reshape(-1, activation.shape[-1])
    given = [mask for mask in masks if mask is not None]
    if not given:
        return rows_nd
    counted = given[0]
    for mask in given[1:]:
        counted = counted & mask.to(counted.device)
    return rows_nd.index_select(0, _places(counted, rows_nd.device))


def _places(mask: Tensor, device: torch.device) -> Tensor:
    """Return which rows a mask keeps, (n,), on a device."""
    known: dict[torch.device, Tensor] = _PLACES.setdefault(mask, {})
    if device not in known:
        # They are found on the device of the mask, which for the batch of a loader is the CPU.
        known[device] = moved(mask.reshape(-1).nonzero().squeeze(1), device)
    return known[device]
