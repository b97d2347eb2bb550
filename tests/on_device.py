"""Tests on another device: `EVATUNE_TEST_DEVICE=cuda python -m pytest tests/pca tests/activations`.

Tests are written for the CPU, with seeded generators of the CPU. Here the tensors that they make are on the device all
the same, with the numbers that the CPU would give, and what they read as NumPy arrays comes from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from tests.fake_device import NAME as FAKE
from tests.fake_device import fake_device
from torch.overrides import TorchFunctionMode

MADE_ON_CPU = (torch.randn, torch.rand, torch.randint, torch.randperm, torch.normal, torch.tensor, torch.as_tensor)
READ_ON_CPU = (torch.Tensor.numpy, torch.Tensor.__array__)


class _FromTheCpu(TorchFunctionMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MADE_ON_CPU and kwargs.get("device") is None:
            return func(*args, **(kwargs | {"device": "cpu"})).to(self.device)
        if func in READ_ON_CPU:
            return func(args[0].cpu(), *args[1:], **kwargs)
        return func(*args, **kwargs)


@contextmanager
def on_device(name: str) -> Iterator[None]:
    """Make everything in the `with` block on a device."""
    with ExitStack() as stack:
        if name == FAKE:
            stack.enter_context(fake_device())
        stack.enter_context(torch.device(name))
        stack.enter_context(_FromTheCpu(name))
        yield
