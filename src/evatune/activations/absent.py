"""Tensors without values: an operation on one costs nothing, and its result has a shape but no values either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class AbsentTensor(Tensor):
    """A tensor of the shape, dtype and device of another one, without its values.

    All operations on it run on the meta device. Reading a value raises an error, as on the meta device. So does writing
    it into a tensor with values, because that tensor would keep its old ones: a `NotImplementedError`, as torch raises
    for copying out of a meta tensor. So does asking for its address, as kernels do that are no operations of torch
    (Triton, extensions in C++): it is zero, and reading there would end all further use of an accelerator.
    """

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device | None = None) -> AbsentTensor:
        """Return one in place of a tensor; `device` is the device that it reports."""
        made: AbsentTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device or like.device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        return made

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        """Return the shape, since there are no values to show."""
        return f"AbsentTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run one operation on the meta device."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, Tensor) and not isinstance(value, AbsentTensor):
                raise NotImplementedError(f"{func} would write a tensor without values into a tensor with values")
        found: list[torch.device] = []

        def emptied(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("meta")
            if not isinstance(value, Tensor):
                return value
            if isinstance(value, AbsentTensor):
                found.append(value.device)
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

        args, kwargs = tree_map(emptied, args), tree_map(emptied, kwargs or {})
        return tree_map(
            lambda value: cls(value, found[0]) if isinstance(value, Tensor) else value, func(*args, **kwargs)
        )
