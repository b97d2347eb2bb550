"""The only work that is done for every batch: matrix products, in half precision where that is faster and enough.

Products of bfloat16 operands are summed in float32 by the hardware; each entry of a product is rounded once to
bfloat16 before it is added to the float32 accumulator, so the error stays relative to the entry and averages out over
batches.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor


def accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in place, in the dtype of the operands, without waiting for the device."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


GRAM_STRIPS = 3
"""How many strips a Gram matrix is made of; each leaves out what is above its diagonal block."""


def accumulate_gram(total_dd: Tensor, rows_nd: Tensor) -> None:
    """Add the lower triangle of ZᵀZ to `total_dd` in place; what stands above the diagonal blocks of strips is left.

    Args:
        total_dd: (d, d), float32 or float64.
        rows_nd: rows Z, (n, d).

    Cost: two thirds of the O(n d²) of the whole product.
    """
    n_features = rows_nd.shape[1]
    height = max(-(-n_features // GRAM_STRIPS), 64)
    for start in range(0, n_features, height):
        stop = min(start + height, n_features)
        accumulate_product(total_dd[start:stop, :stop], rows_nd[:, start:stop].T, rows_nd[:, :stop])


def symmetric(total_dd: Tensor) -> Tensor:
    """Return a new symmetric matrix (d, d) with the lower triangle of `total_dd`."""
    lower_dd = total_dd.tril()
    return lower_dd + lower_dd.tril(-1).T


@functools.cache
def has_fast_bfloat16(device_type: str) -> bool:
    """Tell whether products in bfloat16 run faster than in float32 on this kind of device.

    Args:
        device_type: as in `torch.device.type`.

    Returns:
        True on accelerators that support it and on processors with AMX or AVX512-BF16 (or the Arm equivalent).
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device_type != "cpu":
        return False
    flags = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    return any(flag in flags for flag in ("amx_bf16", "avx512_bf16", " bf16"))


def choose_product_dtype(rows: Tensor, wanted: str | torch.dtype) -> torch.dtype:
    """Choose in which dtype rows are multiplied.

    Args:
        rows: rows as they arrive.
        wanted: a dtype, or "auto": float64 rows in float64, half-precision rows in bfloat16, float32 rows in bfloat16
            where that is fast and else in float32.

    Returns:
        The dtype of the products.
    """
    if isinstance(wanted, torch.dtype):
        return wanted
    if rows.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if has_fast_bfloat16(rows.device.type) else torch.float32
