"""Copies of tensors between devices."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device; the host does not wait for a copy to an accelerator.

    It waits for one to the CPU, whose values would otherwise be read before they have arrived.
    """
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")
