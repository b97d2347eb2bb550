"""Tests on another device: `EVATUNE_TEST_DEVICE=cuda python -m pytest tests/pca tests/activations`.

Tests are written for the CPU, with seeded generators of the CPU. Here what they make (tensors, models) is on the device
all the same, with the numbers that the CPU would give, and what they read or compare is brought to the CPU. evatune
itself gets no such help: a tensor that its code makes without a device is on the CPU, as at a user's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

TEST_DEVICE = os.environ.get("EVATUNE_TEST_DEVICE", "cpu")
"""Where tests run: the tensors that they make are there. What evatune has loaded they move there themselves."""
IN_INFERENCE_MODE = "its tensors have no inference mode"
TRAINED_BY_TRAINER = "this device gives a model new parameters when the Trainer moves it"
"""Why tests are left out on the device without hardware."""

HERE = str(Path(__file__).parent)
PACKAGE = "/src/evatune/"
READS = (torch.Tensor.numpy, torch.Tensor.__array__)


def _is_of_test(*, directly: bool = False) -> bool:
    """Tell whether a test called torch, and not evatune; with `directly`, no other library may stand between them."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name:
            return False
        if name.startswith(HERE) and name != __file__:
            return True
        if directly and "/torch/" not in name and name != __file__:
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _OfTests(TorchFunctionMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None and _is_of_test():
            made = func(*args, **(kwargs | {"device": "cpu"}))
            return made.detach().to(self.device).requires_grad_(made.requires_grad)
        if func in READS and _is_of_test():
            return func(args[0].cpu(), *args[1:], **kwargs)
        if self._is_drawn_on_cpu(args, kwargs) or (_are_mixed(args) and _is_of_test(directly=True)):
            return self._on_cpu(func, args, kwargs)
        return func(*args, **kwargs)

    def _is_drawn_on_cpu(self, args: Any, kwargs: dict[str, Any]) -> bool:
        generator = kwargs.get("generator")
        is_here = any(isinstance(value, torch.Tensor) and not value.is_cpu for value in args)
        return generator is not None and generator.device.type == "cpu" and is_here and _is_of_test()

    def _on_cpu(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        changes = name in ("__setitem__", "__iadd__") or (name.endswith("_") and not name.endswith("__"))
        if changes and "generator" not in kwargs:
            where = args[0].device
            return func(args[0], *(_moved(value, where) for value in args[1:]), **kwargs)
        out = func(*(_moved(value, "cpu") for value in args), **kwargs)
        if changes:
            return args[0].copy_(out)
        return out.to(self.device) if "generator" in kwargs else out


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(one, device) for one in value)
    return {name: _moved(one, device) for name, one in value.items()} if type(value) is dict else value


def _are_mixed(args: Any) -> bool:
    """Tell whether tensors of two devices are combined; numbers in tensors may be anywhere."""
    found = set()
    for value in args:
        for one in value if type(value) in (tuple, list) else (value,):
            if isinstance(one, torch.Tensor) and one.ndim:
                found.add(one.device.type)
    return len(found) > 1 and "meta" not in found


@contextmanager
def on_device(name: str) -> Iterator[None]:
    """Make everything that tests make in the `with` block on a device."""
    from_numpy, assert_close = torch.from_numpy, torch.testing.assert_close

    @wraps(assert_close)
    def close(actual: Any, expected: Any, **options: Any) -> None:
        assert_close(_moved(actual, "cpu"), _moved(expected, "cpu"), **options)

    with ExitStack() as stack:
        if name == "fake":
            from tests.fake_device import fake_device  # not every release of torch lets it be made

            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the device is known to this thread only
            stack.enter_context(fake_device())
        stack.enter_context(_OfTests(name))
        torch.testing.assert_close = close
        torch.from_numpy = lambda array: from_numpy(array).to(name) if _is_of_test() else from_numpy(array)
        try:
            yield
        finally:
            torch.testing.assert_close, torch.from_numpy = assert_close, from_numpy
