"""What rows must be.

Shapes: n rows, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.pca.together import Host, Steps, batched


def check_rows(rows: Tensor, *, n_features: int | None) -> None:
    """Refuse rows that are not a float matrix, or not `n_features` wide if that is given.

    Raises:
        EvaError: in one sentence, what the rows are and what they should be.
    """
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
        found = f"{tuple(rows.shape)} of {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise EvaError(f"rows must be a float tensor of shape (n_rows, n_features), got {found}.")
    if rows.shape[1] == 0:
        raise EvaError(f"rows must have at least one feature, got shape {tuple(rows.shape)}.")
    if n_features is not None and rows.shape[1] != n_features:
        raise EvaError(f"rows have {rows.shape[1]} features, but the rows before had {n_features}.")


def refuse_non_finite(rows_nd: Tensor, squares_d: Tensor) -> None:
    """Refuse rows that hold NaN or infinite values, which `squares_d`, the sums of their squares, (d,), shows.

    Raises:
        EvaError: how many rows hold such values, or that only their squares do.
    """
    if torch.isfinite(squares_d).all():
        return
    n_bad = int((~torch.isfinite(rows_nd).all(dim=1)).sum())
    if n_bad:
        raise EvaError(
            f"{n_bad} of {rows_nd.shape[0]} rows hold NaN or infinite values; nothing was added. "
            "Check the model's activations, or its dtype: float16 overflows where bfloat16 and float32 do not."
        )
    raise EvaError("the squares of the rows overflow; pass the rows as float64.")


def check_finite(squares_d: Tensor) -> Steps[None]:
    """Refuse sums of squares, (d,), of rows that were added without a look at them.

    Raises:
        EvaError: they show that a row holds NaN or infinite values.
    """
    (is_finite,) = yield batched(_are_finite, squares_d)
    if not (yield Host(is_finite))[0]:
        raise EvaError("the rows seen so far hold NaN or infinite values; check the model's activations.")


def _are_finite(squares_d: Tensor) -> tuple[Tensor]:
    return (torch.isfinite(squares_d).all(dim=-1),)
