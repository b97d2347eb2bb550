"""Tensors that wait for their turn: in memory up to a limit, beyond it in files of a temporary folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from evatune.files import writing


@dataclass(frozen=True, kw_only=True)
class _OnDisk:
    """A tensor in a file."""

    path: Path
    """Its bytes."""
    shape: torch.Size
    """Its shape."""
    dtype: torch.dtype
    """Its dtype."""


class WaitingTensors:
    """A mapping from keys to tensors that keeps at most `limit_bytes` of them in memory.

    Files are read whole and not mapped: all of a tensor is needed at once, and mapped pages count as resident.

    Args:
        limit_bytes: how many bytes may wait in memory.
        folder: where the temporary folder is made; by default where the system keeps its own.
    """

    def __init__(self, limit_bytes: int, *, folder: str | os.PathLike[str] | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.in_memory = 0
        self.on_disk = 0
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = count()
        self._kept: dict[Hashable, Tensor | _OnDisk] = {}

    def __enter__(self) -> WaitingTensors:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kept.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        previous = self._kept.pop(key, None)
        if isinstance(previous, Tensor):
            self.in_memory -= previous.nbytes
        elif previous is not None:
            self.on_disk -= previous.path.stat().st_size
        if self.in_memory + tensor.nbytes <= self.limit_bytes:
            self.in_memory += tensor.nbytes
            self._kept[key] = tensor.cpu()
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="evatune-", dir=self._parent)
        path = previous.path if isinstance(previous, _OnDisk) else Path(self._folder.name) / str(next(self._numbers))
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        with writing(path, way_out="make room, or name another folder with scratch= or in TMPDIR"):
            flat.view(torch.uint8).numpy().tofile(path)
        self.on_disk += tensor.nbytes
        self._kept[key] = _OnDisk(path=path, shape=tensor.shape, dtype=tensor.dtype)

    def __getitem__(self, key: Hashable) -> Tensor:
        kept = self._kept[key]
        if isinstance(kept, Tensor):
            return kept
        flat = torch.from_numpy(np.fromfile(kept.path, dtype=np.uint8))
        return flat.view(kept.dtype).reshape(kept.shape)
