"""The only work that is done for every batch: matrix products, in half precision where that is faster and enough.

Products of bfloat16 operands are summed in float32; each entry of a product is rounded once to bfloat16 before it is
added to the float32 accumulator, so the error stays relative to the entry and averages out over batches. cuBLAS would
sum parts of a long product in bfloat16, so it is told not to.
"""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def rounded(tensor: Tensor) -> Tensor:
    """Return a tensor without the digits that bfloat16 has not, in its own dtype."""
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in place, in the dtype of the operands, without waiting for the device."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


@contextmanager
def unrounded(*devices: torch.device) -> Iterator[None]:
    """Keep products from being rounded: operands by autocast on these devices, and to TF32, and sums to bfloat16."""
    with ExitStack() as stack:
        for device_type in {device.type for device in devices}:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(_ALL_DIGITS)
        yield


class _AllDigits(AbstractContextManager[None]):
    """Multiply with all digits of float32, in its products and in sums of bfloat16, whatever the caller has asked for.

    torch has one such precision for all threads. The first thread that enters raises it, and the last one that leaves
    restores it; meanwhile, products of other threads are at most more precise than they have asked for.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._restore = _ask_for_all_digits()
            self._n_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                self._restore()


_ALL_DIGITS = _AllDigits()


def _ask_for_all_digits() -> Callable[[], None]:
    """Raise torch's precision of products, and return what restores it."""
    restore = ExitStack()
    products: Any = torch.backends.cuda.matmul
    # Without split-K no sum has parts.
    if getattr(products, _REDUCED) and getattr(products, f"{_REDUCED}_split_k", True):
        setattr(products, _REDUCED, False)
        restore.callback(setattr, products, _REDUCED, True)
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was asked for by torch's newer names, which must not be mixed with the older ones
        restore.callback(setattr, products, "fp32_precision", products.fp32_precision)
        products.fp32_precision = "ieee"
        return restore.close
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
        restore.callback(torch.set_float32_matmul_precision, before)
    return restore.close


_REDUCED = "allow_bf16_reduced_precision_reduction"

PRODUCT_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
"""In what rows may be multiplied. In float16, products of large numbers overflow and those of small ones vanish."""

BFLOAT16_ROUNDING = 2.0**-9
"""Relative error of a number that was rounded to bfloat16."""

NARROW = 256
"""Rows of up to this many features are multiplied in full precision."""

GRAM_STRIPS = 3
"""A Gram matrix is computed in this many strips of rows; each leaves out the entries right of its diagonal block."""


def _strips(n_features: int) -> list[tuple[int, int]]:
    """Return first and last row of each strip of a Gram matrix."""
    height = max(-(-n_features // GRAM_STRIPS), 64)
    return [(start, min(start + height, n_features)) for start in range(0, n_features, height)]


def accumulate_gram(total_dd: Tensor, rows_nd: Tensor) -> None:
    """Add ZᵀZ to `total_dd` in place, without the entries to the right of the diagonal blocks of strips.

    Args:
        total_dd: (d, d), float32 or float64.
        rows_nd: rows Z, (n, d).

    Cost: two thirds of the O(n d²) of the whole product.
    """
    for start, stop in _strips(rows_nd.shape[1]):
        accumulate_product(total_dd[start:stop, :stop], rows_nd[:, start:stop].T, rows_nd[:, :stop])


def symmetric(total_dd: Tensor) -> Tensor:
    """Return a new matrix (d, d) with the entries that `accumulate_gram` leaves out filled in."""
    whole_dd = total_dd.clone()
    for start, stop in _strips(len(total_dd)):
        whole_dd[:start, start:stop] = total_dd[start:stop, :start].T
    return whole_dd


def energies_along(total_dd: Tensor, directions_kd: Tensor) -> Tensor:
    """Return vᵀ S v for every row v of `directions_kd`, (k,), with S = `symmetric(total_dd)`. Cost O(d² k)."""
    energies_k = directions_kd.new_zeros(len(directions_kd))
    for start, stop in _strips(len(total_dd)):
        weighted_ks = directions_kd[:, :stop].clone()
        weighted_ks[:, :start] *= 2  # entries left of the diagonal block occur a second time, mirrored
        energies_k += ((weighted_ks @ total_dd[start:stop, :stop].T) * directions_kd[:, start:stop]).sum(dim=1)
    return energies_k


def gram_norm(total_dd: Tensor) -> Tensor:
    """Return the Frobenius norm of `symmetric(total_dd)`, a scalar tensor."""
    squares = [
        2 * total_dd[start:stop, :start].square().sum() + total_dd[start:stop, start:stop].square().sum()
        for start, stop in _strips(len(total_dd))
    ]
    return torch.stack(squares).sum().sqrt()


@functools.cache
def has_fast_bfloat16(device_type: str) -> bool:
    """Tell whether products in bfloat16 run faster than in float32 on this kind of device.

    Args:
        device_type: as in `torch.device.type`.

    Returns:
        True on accelerators that have it in hardware (cards older than Ampere compute it in float32, slowly) and on
        processors with AMX, with AMD's AVX512-BF16, or the Arm equivalent. Intel's AVX512-BF16 is not enough: on a Xeon
        that has it without AMX, products in bfloat16 took 1.4 to 2.1 times as long as in float32. On an EPYC, forward
        passes in bfloat16 took 0.7 of the time.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    flags = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    return any(flag in flags for flag in ("amx_bf16", " bf16")) or ("AuthenticAMD" in flags and "avx512_bf16" in flags)


def choose_product_dtype(rows: Tensor, wanted: str | torch.dtype, *, n_components: int) -> torch.dtype:
    """Choose in which dtype rows are multiplied.

    Args:
        rows: rows as they arrive, (n, d).
        wanted: a dtype, or "auto": float64 rows in float64, others in bfloat16 where that is fast and else in float32
            (never in float16, in which products of large activations overflow and those of small ones are lost).
            Two kinds of rows are multiplied in float32 all the same: narrow ones, where bfloat16 gains little, and
            those of which so many components are wanted that rounding errors would hide the smallest.
        n_components: k.

    Returns:
        The dtype of the products.
    """
    if isinstance(wanted, torch.dtype):
        return wanted
    if rows.dtype == torch.float64:
        return torch.float64
    n_features = rows.shape[1]
    full = n_features <= NARROW or 2 * n_components > n_features or not has_fast_bfloat16(rows.device.type)
    return torch.float32 if full else torch.bfloat16
