"""What processes exchange: numbers, small tables, and tensors of any shapes. Nothing is pickled.

Tensors are sent as bytes after a header with names, shapes and dtypes, so processes may have different tensors, of
different shapes, under different names, or none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

State = dict[str, Tensor]
Layout = list[tuple[str, str, list[int]]]

BUCKET_BYTES = 64 * 1024**2
"""How many bytes one process sends at a time; it receives as many from each of the others."""


class Processes:
    """The processes of the default group, and what this one has sent them.

    Attributes:
        number: of this process, from 0.
        size: how many there are.
        bytes_sent: what this process contributed to all exchanges, padding included.
    """

    def __init__(self) -> None:
        self.number, self.size = dist.get_rank(), dist.get_world_size()
        self.bytes_sent = 0
        # gloo exchanges tensors on the CPU, the other backends exchange tensors on the accelerator.
        on_cpu = dist.get_backend() in ("gloo", "mpi")
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    @staticmethod
    def present() -> bool:
        """Tell whether there is more than one process."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which must have equal shapes and dtypes."""
        tensor = tensor.to(self.device).contiguous()
        everyone = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(everyone, tensor)
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return everyone

    def gather_numbers(self, *numbers: int) -> list[list[int]]:
        """Return the whole numbers of each process; all processes must give equally many."""
        return [row.tolist() for row in self.gather(torch.tensor(numbers, dtype=torch.int64))]

    def gather_json(self, value: Any) -> list[Any]:
        """Return the values of all processes, of any length."""
        packed = zlib.compress(json.dumps(value).encode(), level=1)
        lengths = [length for (length,) in self.gather_numbers(len(packed))]
        everyone = self.gather(_padded(torch.frombuffer(bytearray(packed), dtype=torch.uint8), max(lengths)))
        return [
            json.loads(zlib.decompress(bytes(received[:length].tolist())))
            for received, length in zip(everyone, lengths, strict=True)
        ]

    def gather_states(
        self, states: Mapping[str, State], layouts: Sequence[Mapping[str, Layout]]
    ) -> Iterator[tuple[str, list[State]]]:
        """Yield for each name the states of the processes that have one, in the order of processes.

        Args:
            states: the states of this process by name.
            layouts: `layout_of` the states of every process.
        """
        sizes = {
            name: [_n_bytes(layout[name]) if name in layout else 0 for layout in layouts]
            for name in dict.fromkeys(name for layout in layouts for name in layout)
        }
        for bucket in _buckets(sizes):
            filled = [sum(sizes[name][number] for name in bucket) for number in range(self.size)]
            own = [as_bytes(tensor).to(self.device) for name in bucket for tensor in states.get(name, {}).values()]
            sent = torch.cat(own) if own else torch.zeros(0, dtype=torch.uint8, device=self.device)
            received = self.gather(_padded(sent, max(filled)))
            starts = [0] * self.size
            for name in bucket:
                found = []
                for number, layout in enumerate(layouts):
                    if name in layout:
                        stop = starts[number] + sizes[name][number]
                        found.append(_from_bytes(received[number][starts[number] : stop], layout[name]))
                        starts[number] = stop
                yield name, found


def layout_of(states: Mapping[str, State]) -> dict[str, Layout]:
    """Return a description of the tensors of each state for other processes, ready for JSON."""
    return {
        name: [(entry, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for entry, tensor in state.items()]
        for name, state in states.items()
    }


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, (n,)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _n_bytes(layout: Layout) -> int:
    return sum(torch.Size(shape).numel() * _dtype(dtype).itemsize for _, dtype, shape in layout)


def _from_bytes(flat: Tensor, layout: Layout) -> State:
    state, start = {}, 0
    for entry, dtype, shape in layout:
        stop = start + torch.Size(shape).numel() * _dtype(dtype).itemsize
        # A copy begins at an address that fits every dtype.
        state[entry] = flat[start:stop].clone().view(_dtype(dtype)).reshape(shape)
        start = stop
    return state


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _padded(flat: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(flat, (0, length - len(flat)))


def _buckets(sizes: Mapping[str, Sequence[int]]) -> Iterator[list[str]]:
    """Yield names in groups that are small enough to be sent at once, the same in all processes."""
    bucket: list[str] = []
    n_bytes = 0
    for name, of_processes in sizes.items():
        if bucket and n_bytes + max(of_processes) > BUCKET_BYTES:
            yield bucket
            bucket, n_bytes = [], 0
        bucket.append(name)
        n_bytes += max(of_processes)
    if bucket:
        yield bucket
