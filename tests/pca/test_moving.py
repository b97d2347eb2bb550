"""Copies between devices."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evatune.pca.moving import moved


class Copies(TorchDispatchMode):
    """Notes of each copy whether the host goes on before it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            self.seen.append(kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


@pytest.mark.on_cpu("it counts copies, and another device makes its own")
def test_the_host_waits_for_copies_to_itself_alone():
    with Copies() as copies:
        moved(torch.ones(2), torch.device("cpu"), torch.float64)
        moved(torch.ones(2), torch.device("meta"))
    assert copies.seen == [False, True]
