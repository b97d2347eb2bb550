"""A sequence of values that stand in a temporary file, for data that do not fit in memory."""

from __future__ import annotations

import mmap
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from evatune.files import user_cache, writing

Item = TypeVar("Item")


class DiskList(Sequence[Item], Generic[Item]):
    """Values in a file of their own, which the system deletes when nobody reads it any more, at a crash too.

    The file has no name, so what is unpickled from it is what this process has written. Each key makes a new copy of
    its value. In memory are 16 bytes a value. The file is in `user_cache()`.

    Args:
        values: what to keep at first.

    Raises:
        EvaError: the file cannot be written.
    """

    def __init__(self, values: Iterable[Item] = ()) -> None:
        folder = user_cache()
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._begins, self._ends = array("Q"), array("Q")
        self._size = 0
        self._content: mmap.mmap | None = None
        for value in values:
            self.append(value)

    def append(self, value: Item) -> None:
        """Keep one more value.

        Raises:
            EvaError: the disk is full.
        """
        content = memoryview(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))
        begin, self._content = self._size, None
        with self._writing():
            while len(content):  # a disk may take a part
                n_written = self._file.write(content)
                content, self._size = content[n_written:], self._size + n_written
        self._begins.append(begin)
        self._ends.append(self._size)

    def selected(self, indices: Iterable[int]) -> DiskList[Item]:
        """Return the values at these places, in this order, from the same file; it is not to grow any more."""
        chosen: DiskList[Item] = DiskList.__new__(DiskList)
        chosen._file, chosen._size, chosen._content = self._file, self._size, self._mapped()
        chosen._begins, chosen._ends = array("Q"), array("Q")
        for index in indices:
            chosen._begins.append(self._begins[index])
            chosen._ends.append(self._ends[index])
        return chosen

    def __len__(self) -> int:
        return len(self._begins)

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(len(self))[index])
        value: Item = pickle.loads(self._mapped()[self._begins[index] : self._ends[index]])
        return value

    def _mapped(self) -> Any:
        """Return the file's content, mapped into memory: the system reads it when needed, and may drop it again."""
        if self._content is None and self._size:
            self._content = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
        return self._content

    def _writing(self) -> Any:
        return writing(user_cache(), way_out="make room, or name another disk in EVATUNE_CACHE")


def empty_list(*, on_disk: bool) -> list[Any] | DiskList[Any]:
    """Return an empty list, in memory or on disk."""
    return DiskList() if on_disk else []


def stored(values: Iterable[Item], *, on_disk: bool) -> Sequence[Item]:
    """Return values as a tuple, or as a list on disk."""
    return DiskList(values) if on_disk else tuple(values)


def selected(values: Sequence[Item], indices: Iterable[int]) -> Sequence[Item]:
    """Return the values at these places, in this order; those of a list on disk stay there."""
    return values.selected(indices) if isinstance(values, DiskList) else tuple(values[index] for index in indices)
