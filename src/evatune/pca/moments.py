"""Running count, mean and variance of rows, about a shift that is fixed by the first batch.

Shapes: n rows, d features.

Activations can have means a thousand times their deviation. Sums of squares in float32 then lose every digit, so all
rows are shifted by the mean of the first batch before anything is accumulated: the rest is small, and the sums stay
plain sums, which merge by addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evatune.pca.products import rounded

SLICE = 2048
"""A CPU squares this many rows at a time, so that the squares of a large batch take less memory than it does."""

ROUNDINGS = 8
"""A sum of squares may be wrong by this many times the machine epsilon of the rows, as a share of itself."""


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums of vectors: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _sums(rows_nd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of rows and of their squares, each (d,), summed in float32 at least."""
    dtype = torch.promote_types(rows_nd.dtype, torch.float32)
    if rows_nd.device.type == "cpu":
        wide_nd = rows_nd.to(dtype)
        return wide_nd.sum(dim=0), wide_nd.square().sum(dim=0)
    # An accelerator would take longest for reading and writing copies of the rows; a norm makes none.
    return rows_nd.sum(dim=0, dtype=dtype), torch.linalg.vector_norm(rows_nd, dim=0, dtype=dtype).square()


def feature_variances(sum_d: Tensor, squares_d: Tensor, *, n_rows: int, dtype: torch.dtype, center: bool) -> Tensor:
    """Return the variance of each feature, (d,), or of a stack; see `Moments.variance_d`.

    A difference of sums that is no more than their rounding errors (`ROUNDINGS`) is no variance.

    Args:
        sum_d: sum of the shifted rows.
        squares_d: sum of their squares.
        n_rows: how many there are.
        dtype: the dtype that the rows were squared in.
        center: whether the variance is about the mean, or about the shift.
    """
    spread_d = squares_d
    if center:
        spread_d = squares_d - n_rows * (sum_d / max(n_rows, 1)).square()
        rounding_d = ROUNDINGS * torch.finfo(dtype).eps * squares_d
        spread_d = torch.where(spread_d < rounding_d, 0.0, spread_d)
    return spread_d / max(n_rows - 1, 1)


def with_total_variance(numbers_k: Tensor, sum_d: Tensor, squares_d: Tensor, **facts: Any) -> tuple[Tensor]:
    """Return numbers and after them the sum of `feature_variances`, (k + 1,), or those of a stack."""
    total = feature_variances(sum_d, squares_d, **facts).sum(dim=-1, keepdim=True)
    return (torch.cat([numbers_k.to(total), total], dim=-1),)


@dataclass
class Moments:
    """Count, sum and sum of squares of shifted rows.

    The variance is the one-pass form about the shift; with a shift near the mean it is as stable as the update of
    Chan, Golub and LeVeque (1983) that Algorithm 2 of the paper names, and it is a sum.
    """

    shift_d: Tensor
    """The vector that is subtracted from every row, (d,), in the dtype of the accumulated matrices."""
    sum_d: Tensor
    """Sum of the shifted rows, (d,)."""
    squares_d: Tensor
    """Sum of the squared shifted rows, (d,)."""
    n_rows: int = 0
    """How many rows were added."""
    is_rounded: bool = False
    """Whether the shift is known to have no more digits than bfloat16."""

    @classmethod
    def around(cls, shift_d: Tensor, *, is_rounded: bool = False) -> Moments:
        """Return empty moments about a shift of shape (d,)."""
        zeros = torch.zeros_like(shift_d, dtype=accumulator_dtype(shift_d.device))
        return cls(shift_d=shift_d, sum_d=zeros, squares_d=zeros.clone(), is_rounded=is_rounded)

    @classmethod
    def about(cls, first_nd: Tensor, *, center: bool) -> Moments:
        """Return empty moments for rows of which these are the first, (n, d); they choose the dtype of all sums.

        The shift is the mean of these rows, or zero if `center` is false. For rows in bfloat16 it is rounded to
        bfloat16, so that `shifted` can stay in bfloat16.
        """
        wide_nd = first_nd.to(torch.promote_types(first_nd.dtype, torch.float32))
        shift_d = wide_nd.mean(dim=0) if center else torch.zeros_like(wide_nd[0])
        is_half = first_nd.dtype == torch.bfloat16
        return cls.around(rounded(shift_d) if is_half else shift_d, is_rounded=is_half)

    def shifted(self, rows_nd: Tensor, *, wanted: torch.dtype) -> Tensor:
        """Return rows minus the shift, (n, d), with all digits, or in bfloat16 where that is wanted and enough.

        A difference in bfloat16 is what the wider one would be rounded to for its product. All entries of a feature may
        be rounded in one direction, so the mean is as precise as they are, to 2⁻⁹ of the largest.
        """
        shift_d = self.shift_d.to(rows_nd.device)
        if self.is_rounded and rows_nd.dtype == wanted == torch.bfloat16:
            return rows_nd - shift_d.to(wanted)
        # Rows in half precision become wider by the subtraction, without a wider copy of them before it.
        is_half = rows_nd.dtype in (torch.float16, torch.bfloat16)
        return (rows_nd if is_half else rows_nd.to(shift_d.dtype)) - shift_d

    def with_rows(self, shifted_nd: Tensor) -> Moments:
        """Return the moments with further rows, which are shifted already, (n, d). Cost O(n d)."""
        n_rows, sum_d, squares_d = self.n_rows + len(shifted_nd), self.sum_d, self.squares_d
        is_long = len(shifted_nd) > SLICE and shifted_nd.device.type == "cpu"
        for slice_nd in shifted_nd.split(SLICE) if is_long else (shifted_nd,):
            more_d, more_squares_d = _sums(slice_nd)
            sum_d, squares_d = sum_d + more_d, squares_d + more_squares_d
        return Moments(self.shift_d, sum_d, squares_d, n_rows, is_rounded=self.is_rounded)

    @property
    def offset_d(self) -> Tensor:
        """Mean of the shifted rows, (d,): how far the shift is from the mean."""
        return self.sum_d / max(self.n_rows, 1)

    @property
    def mean_d(self) -> Tensor:
        """Mean of the rows, (d,)."""
        return self.shift_d + self.offset_d

    def variance_d(self, *, center: bool) -> Tensor:
        """Variance of each feature, (d,), with n - 1 in the denominator; about zero if `center` is false."""
        return feature_variances(self.sum_d, self.squares_d, **self.facts, center=center)

    @property
    def facts(self) -> dict[str, Any]:
        """What `feature_variances` needs to know beside the sums."""
        return {"n_rows": self.n_rows, "dtype": self.shift_d.dtype}

    def rebased(self, shift_d: Tensor) -> Moments:
        """Return the same moments about another shift, (d,)."""
        move_d = (self.shift_d - shift_d).to(self.sum_d.dtype)
        return Moments(
            shift_d=shift_d,
            sum_d=self.sum_d + self.n_rows * move_d,
            squares_d=self.squares_d + 2 * move_d * self.sum_d + self.n_rows * move_d.square(),
            n_rows=self.n_rows,
        )

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows, about this one's shift."""
        theirs = other.rebased(self.shift_d)
        sum_d, squares_d = self.sum_d + theirs.sum_d, self.squares_d + theirs.squares_d
        return replace(self, sum_d=sum_d, squares_d=squares_d, n_rows=self.n_rows + theirs.n_rows)

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments as tensors that share their memory."""
        n_rows = torch.tensor(self.n_rows)
        return {"n_samples_seen": n_rows, "shift": self.shift_d, "sum": self.sum_d, "squares": self.squares_d}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Return the moments that `tensors` describes."""
        shift_d = tensors["shift"]
        return cls(
            shift_d=shift_d,
            sum_d=tensors["sum"],
            squares_d=tensors["squares"],
            n_rows=int(tensors["n_samples_seen"]),
            is_rounded=torch.equal(rounded(shift_d), shift_d),
        )
