"""A device that computes on the CPU and counts how often the host waits for it: `torch.device("fake")`.

Its tensors are a subclass with a tensor of the CPU inside, so code sees a device that is not the CPU: moving, mixing of
devices and reading values work, or fail, as on an accelerator.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fake"
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2")
"""Operations that give the host a value, or a shape that depends on values."""

waits: Counter[str] = Counter()
"""How often the host has waited, by the place in this package that made it wait: for a value, or for a copy."""


class _Backend:
    """What torch asks of a kind of device; outside of `fake_device` it has none of them, so that nothing takes one."""

    is_on = False

    def is_initialized(self) -> bool:
        return self.is_on

    is_available = is_initialized

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return int(self.is_on)

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: int = 0) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: int = 0) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_BACKEND = _Backend()
_setup_privateuseone_for_python_backend(NAME, backend_module=_BACKEND)

_AUTOCAST = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
_NO_AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_NO_AUTOCAST.fallback(torch.library.fallthrough_kernel)


def _let_autocast(name: str) -> None:
    """Let an operation take its operands in the dtype of autocast, as other devices do."""
    operation = getattr(torch.ops.aten, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operation(*(_in_half(value, dtype) for value in args), **kwargs)

    _AUTOCAST.impl(name, run)


def _in_half(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


for _name in ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention", "conv1d", "conv2d"):
    _let_autocast(_name)


class FakeTensor(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, /, **attributes: Any) -> Any:
        if inner.is_meta:  # accelerate makes an empty parameter, of the class and with the attributes of this one
            return torch.nn.Parameter(inner, requires_grad=attributes.get("requires_grad", True))
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, inner: torch.Tensor, /) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented if _answer_themselves(types) else _run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        _wait()
        return self.inner.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeTensor:
        if id(self) not in memo:
            copied = memo[id(self)] = FakeTensor(self.inner.clone()).requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"FakeTensor({self.inner})"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    is_here = any(isinstance(leaf, FakeTensor) for leaf in leaves)
    name, device = func.overloadpacket.__name__, kwargs.get("device")
    if is_here and name != "copy_" and _are_mixed(name, args, leaves):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got tensors of two.")
    if (is_here and name in READS) or _is_blocking_copy(name, args, kwargs):
        _wait()
    inner_args, inner_kwargs = pytree.tree_map(_unwrapped, (args, kwargs))
    if device is not None and torch.device(device).type == NAME:
        inner_kwargs["device"] = "cpu"
    if name == "histc":  # of whole numbers too, as on accelerators
        inner_args = (inner_args[0].float(), *inner_args[1:])
    out = func(*inner_args, **inner_kwargs)
    goes_there = torch.device(device).type == NAME if device is not None else is_here
    if not goes_there:
        if is_here:
            _wait()
        return out
    return return_and_correct_aliasing(func, args, kwargs, pytree.tree_map(_wrapped, out))


def _are_mixed(name: str, args: Any, leaves: list[Any]) -> bool:
    """Tell whether an operation of the device gets what is in main memory: numbers, and places in a tensor, may be."""
    if name in ("index", "index_put_"):
        leaves = [args[0], *args[2:3]] if isinstance(args[0], FakeTensor) else args[:3]
    tensors = [leaf for leaf in pytree.tree_leaves(leaves) if isinstance(leaf, torch.Tensor)]
    return any(tensor.ndim and not isinstance(tensor, FakeTensor) for tensor in tensors)


def _is_blocking_copy(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether an operation copies from main memory to the device, or back into it, and waits until it is done."""
    if name in ("index", "index_put_"):  # by numbers that are in main memory, or by a mask
        places = [place for place in args[1] if isinstance(place, torch.Tensor)]
        is_filled = name == "index_put_" and not args[2].ndim  # with one number, which needs no places
        is_masked = any(place.dtype == torch.bool for place in places) and not is_filled
        there = any(not isinstance(place, FakeTensor) for place in places)
        return isinstance(args[0], FakeTensor) and (is_masked or there)
    if name == "_to_copy":
        device = kwargs.get("device")
        is_there = device is not None and torch.device(device).type == NAME
        return is_there and not isinstance(args[0], FakeTensor) and not kwargs.get("non_blocking")
    non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    return name == "copy_" and isinstance(args[0], FakeTensor) != isinstance(args[1], FakeTensor) and not non_blocking


def _unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, FakeTensor) else value


def _wrapped(value: Any) -> Any:
    return FakeTensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else value


def _wait() -> None:
    """Count a wait, unless the model itself asked for it."""
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        assert frame.f_back is not None
        frame = frame.f_back
    if "/transformers/" not in frame.f_code.co_filename:
        waits[f"{frame.f_code.co_filename.rpartition('/evatune/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"] += 1


def _answer_themselves(types: Any) -> bool:
    return any(kind not in (FakeTensor, torch.Tensor, torch.nn.Parameter) for kind in types)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _answer_themselves(types):
            return func(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """Does what torch's own code does for devices that it knows: move numbers to them, and `tensor.data = value`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == NAME:
            return func(*args, **(kwargs | {"device": None})).to(device)
        if getattr(func, "__self__", None) is torch.Tensor.data and func.__name__ == "__set__":
            return _set_data(*args)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return func(args[0], tuple(map(_numbers, index)))
        return func(*args, **kwargs)


def _numbers(index: Any) -> Any:
    return torch.tensor(list(index), device="cpu").to(NAME) if isinstance(index, range | list) else index


def _set_data(target: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(target, FakeTensor) != isinstance(value, FakeTensor):
        torch.utils.swap_tensors(target, _like(target, value))
        return
    torch.Tensor.data.__set__(target, value)  # type: ignore[attr-defined]
    if isinstance(target, FakeTensor) and isinstance(value, FakeTensor):
        target.inner = value.inner


def _like(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the value, as the kind of tensor that the target is."""
    if isinstance(target, torch.nn.Parameter):
        return torch.nn.Parameter(value.detach(), requires_grad=target.requires_grad)
    return value.detach().requires_grad_(target.requires_grad)


@contextmanager
def fake_device() -> Iterator[torch.device]:
    """Make the device usable in the `with` block; modules can be moved to it."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _BACKEND.is_on = True
    try:
        with _Mode(), _Made():
            yield torch.device(NAME)
    finally:
        _BACKEND.is_on = False
        torch.__future__.set_overwrite_module_params_on_conversion(before)
        waits.clear()
