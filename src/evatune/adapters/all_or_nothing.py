"""A model is changed completely or not at all: its state is noted before, and restored if anything raises.

PEFT replaces modules, freezes parameters, sets attributes and registers hooks one by one, and an error in the middle
leaves the model half changed. So the following is noted: the attributes of every module (submodules, parameters,
buffers and hooks are attributes too) and of every configuration; and for every parameter, its storage and whether it
requires a gradient. No weight is copied: code that changes the numbers in a storage must hand over a copy (`let_go`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class Before:
    """The state of a model before a change.

    Args:
        model: the model, with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        owners: dict[int, Any] = {id(module): module for module in model.modules()}
        configs = [vars(module).get("config") for module in model.modules()]
        owners |= {id(config): config for config in configs if hasattr(config, "__dict__")}
        self._attributes = [(owner, type(owner), _noted(vars(owner))) for owner in owners.values()]
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._tensors = [(tensor, tensor.data, tensor.requires_grad, tensor.grad) for tensor in tensors.values()]
        self._copies: dict[int, Tensor] = {}

    def let_go(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Keep these copies instead of the storage of parameters whose numbers are about to change."""
        self._copies |= {id(tensor): copy for tensor, copy in copies.items()}
        self._tensors = [
            (tensor, self._copies.get(id(tensor), data), required, gradient)
            for tensor, data, required, gradient in self._tensors
        ]

    def restore(self) -> None:
        """Restore the model."""
        for owner, kind, noted in self._attributes:
            owner.__class__ = kind  # parametrizations make classes of their own
            _put_back(vars(owner), noted)
        for tensor, data, required, gradient in self._tensors:
            if id(tensor) in self._copies:
                tensor.data = data.to(tensor.device)
            elif tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                tensor.data = data
            if tensor.requires_grad != required:
                tensor.requires_grad_(required)
            if tensor.grad is not gradient:
                tensor.grad = gradient


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[Before]:
    """Restore a model if the `with` block raises.

    Args:
        model: the model, with or without adapters.

    Cost: O(modules + parameters), without copying a tensor. Until the block ends, tensors that it replaces stay
    in memory.
    """
    before = Before(model)
    try:
        yield before
    except BaseException:
        before.restore()
        raise


def _noted(attributes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return each attribute and, if it is a container, a copy of its contents, since it may be changed in place."""
    return {
        name: (value, value.copy() if isinstance(value, dict | list | set) else None)
        for name, value in attributes.items()
    }


def _put_back(attributes: dict[str, Any], noted: Mapping[str, tuple[Any, Any]]) -> None:
    attributes.clear()
    for name, (value, held) in noted.items():
        if held is not None:
            value.clear()
            value.extend(held) if isinstance(value, list) else value.update(held)
        attributes[name] = value
