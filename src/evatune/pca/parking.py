"""`Parkable`: a matrix of an accelerator that waits in main memory while it is not used.

Copies between the two keep all bits. On CUDA the host does not wait for them: memory in between is pinned, and device
operations run in the order in which they were asked for.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

OWN_MEMORY = ("cpu", "mps")
"""Kinds of devices that compute in main memory: parking would copy it to itself."""


def room_for(matrix: Tensor) -> Tensor:
    """Return main memory for a matrix of an accelerator; on CUDA it is pinned, so that copies need no wait."""
    return torch.empty(matrix.shape, dtype=matrix.dtype, device="cpu", pin_memory=matrix.device.type == "cuda")


class Parkable:
    """A matrix on its device; once it is parked, in main memory, from where it comes back while it is used.

    Args:
        matrix: on its device. Who changes its entries in place gives it to `put` again.
        changes: whether rows change it, so that a copy of it in main memory costs a second one after each use.

    Attributes:
        is_parked: whether it is in main memory while it is not used.
    """

    def __init__(self, matrix: Tensor, *, changes: bool) -> None:
        self.changes = changes
        self.is_parked = False
        self._there: Tensor | None = None  # in main memory
        self._is_stale = True  # whether main memory has other numbers, or none
        self.put(matrix)

    def put(self, matrix: Tensor) -> None:
        """Replace the matrix, or tell that its entries have changed."""
        self._here: Tensor | None = matrix
        self._is_stale = True
        self.shape, self.nbytes, self.device = matrix.shape, matrix.nbytes, matrix.device

    def get(self) -> Tensor:
        """Return the matrix, which stays on its device until `leave`."""
        if self._here is None:
            assert self._there is not None
            self._here = self._there.to(self.device, non_blocking=True)
        return self._here

    @property
    def device_bytes(self) -> int:
        """How many bytes it takes of a device that has memory of its own."""
        return 0 if self._here is None or self.device.type in OWN_MEMORY else self.nbytes

    def park(self) -> None:
        """Keep it in main memory from now on between two uses, where its device has a memory of its own."""
        self.is_parked = self.device.type not in OWN_MEMORY
        self.leave()

    def leave(self) -> None:
        """End a use: a parked matrix leaves its device."""
        if not self.is_parked or self._here is None:
            return
        if self._is_stale:
            there = self._there
            if there is None or there.shape != self.shape or there.dtype != self._here.dtype:
                there = room_for(self._here)
            self._there = there.copy_(self._here, non_blocking=True)
            self._is_stale = False
        self._here = None

    def __deepcopy__(self, memo: object) -> Self:
        """Return a copy of the matrix that is on the device: main memory may not have the numbers yet."""
        copied = type(self)(self.get().clone(), changes=self.changes)
        copied.is_parked = self.is_parked
        copied.leave()
        self.leave()
        return copied
