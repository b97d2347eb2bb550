"""Which targets receive the very same tensor, so that it is measured once (q, k and v; gate and up).

Tensors are compared by what they are, never by their values: same memory, same geometry, same version. A tensor is
held by a weak reference only; while it is alive its memory cannot be another tensor's.
"""

from __future__ import annotations

import weakref

from torch import Tensor


class SeenTensors:
    """The tensors that one forward pass has shown so far, numbered."""

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor: a new one, unless this tensor was seen before."""
        version = None if tensor.is_inference() else tensor._version  # tensors made in inference mode have none
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, version)
        if key in self._seen:
            reference, number = self._seen[key]
            if reference() is not None:
                return number
        self._count += 1
        self._seen[key] = (weakref.ref(tensor), self._count)
        return self._count
