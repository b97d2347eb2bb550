"""Running count, mean and variance of rows, about a shift that is fixed by the first batch.

Shapes: n rows, d features.

Activations can have means a thousand times their deviation. Sums of squares in float32 then lose every digit, so all
rows are shifted by the mean of the first batch before anything is accumulated: the rest is small, and the sums stay
plain sums, which merge by addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SLICE = 2048
"""Rows are squared this many at a time, so that the squares of a large batch do not take as much memory as it does."""


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums of vectors: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


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

    @classmethod
    def around(cls, shift_d: Tensor) -> Moments:
        """Return empty moments about a shift of shape (d,)."""
        zeros = torch.zeros_like(shift_d, dtype=accumulator_dtype(shift_d.device))
        return cls(shift_d=shift_d, sum_d=zeros, squares_d=zeros.clone())

    def update(self, shifted_nd: Tensor) -> None:
        """Add rows that are shifted already, (n, d). Cost O(n d)."""
        self.n_rows += shifted_nd.shape[0]
        self.sum_d += shifted_nd.sum(dim=0)
        for slice_nd in shifted_nd.split(SLICE):
            self.squares_d += slice_nd.square().sum(dim=0)

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
        squares_d = self.squares_d - self.n_rows * self.offset_d.square() if center else self.squares_d
        return squares_d.clamp_min(0.0) / max(self.n_rows - 1, 1)

    def rebased(self, shift_d: Tensor) -> Moments:
        """Return the same moments about another shift, (d,)."""
        move_d = (self.shift_d - shift_d).to(self.sum_d.dtype)
        return Moments(
            shift_d=shift_d,
            sum_d=self.sum_d + self.n_rows * move_d,
            squares_d=self.squares_d + 2 * move_d * self.sum_d + self.n_rows * move_d.square(),
            n_rows=self.n_rows,
        )

    def plus(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows, which must be about the same shift."""
        return Moments(
            shift_d=self.shift_d,
            sum_d=self.sum_d + other.sum_d,
            squares_d=self.squares_d + other.squares_d,
            n_rows=self.n_rows + other.n_rows,
        )

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows, about this one's shift."""
        return self.plus(other.rebased(self.shift_d))

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments as tensors that share their memory."""
        n_rows = torch.tensor(self.n_rows)
        return {"n_samples_seen": n_rows, "shift": self.shift_d, "sum": self.sum_d, "squares": self.squares_d}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Return the moments that `tensors` describes."""
        n_rows = int(tensors["n_samples_seen"])
        return cls(shift_d=tensors["shift"], sum_d=tensors["sum"], squares_d=tensors["squares"], n_rows=n_rows)
