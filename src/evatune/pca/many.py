"""Functions for many streaming PCAs at once: their factorizations run side by side (`evatune.pca.together`).

A PCA that has seen no rows is skipped. Beside them, `groups_of` limits how many are worked on at a time, and `on_host`
copies many tensors at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from evatune.pca.contract import AnyPCA
from evatune.pca.together import ACCELERATOR_BYTES, Task, together

STATES_BYTES = 576 * 1024**2
"""What the matrices of all sketches may take of an accelerator between two uses (`make_room`).

Those of Llama-2-7B begin with 546 MiB at rank 16 and rho 2. What is kept and used beside them leaves room for no more
than this within 1 GB above a bare pass (docs/accelerators.md#memory).
"""


def settle_all(pcas: Iterable[AnyPCA]) -> None:
    """Do the work that `AnyPCA.add` has left, for all of them."""
    _do(Task.SETTLE, pcas)


def snapshot_all(pcas: Iterable[AnyPCA]) -> None:
    """Find the present components of all of them, which `AnyPCA.snapshot` then returns at no cost."""
    _do(Task.SNAPSHOT, pcas)


def learn_all(pcas: Iterable[AnyPCA]) -> None:
    """Refresh, and find the final components."""
    pcas = list(pcas)
    for group in groups_of(pcas):
        _do(Task.REFRESH, pcas[group])
        _do(Task.LEARN, pcas[group])


def groups_of(pcas: Sequence[AnyPCA]) -> Iterator[slice]:
    """Yield groups of neighbours, each of which an accelerator factorizes at once; a group is released before the next.

    A caller that does all its work with one group before the next never holds the eigenpairs of all sketches. On the
    CPU, which has more memory and less of a hurry, all are one group, which is not released.
    """
    begins: list[int] = []
    n_bytes = 0
    for place, pca in enumerate(pcas):
        size = sum(work.n_bytes for work in pca.works(Task.REFRESH) if work.device.type != "cpu")
        if not begins or n_bytes + size > ACCELERATOR_BYTES:
            begins.append(place)
            n_bytes = 0
        n_bytes += size
    for begin, end in itertools.pairwise([*begins, len(pcas)]):
        yield slice(begin, end)
        if len(begins) > 1:
            for pca in pcas[begin:end]:
                pca.release()


def make_room(pcas: Sequence[AnyPCA]) -> None:
    """Let sketches leave an accelerator until they are used again, as far as together they take more than they may.

    They may take `STATES_BYTES`, or what they began with if that is more. Test matrices go first: rows do not
    change them, so that they are copied in one direction only. All numbers stay as they are.
    """
    held = [matrix for pca in pcas for matrix in pca.parkable() if matrix.device_bytes]
    n_bytes = sum(matrix.device_bytes for matrix in held)
    if n_bytes <= STATES_BYTES:
        return
    begun = sum(pca.cost(n_features=pca.n_features_in_).initial_bytes for pca in pcas if pca.is_fitted)
    for matrix in sorted(held, key=lambda matrix: matrix.changes):
        if n_bytes > max(STATES_BYTES, begun):
            n_bytes -= matrix.device_bytes
            matrix.park()


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in float32 on the CPU; the host waits once for each other device. Those there are not copied."""
    tensors = [tensor.float() for tensor in tensors]
    for device in {tensor.device for tensor in tensors} - {torch.device("cpu")}:
        there = [number for number, tensor in enumerate(tensors) if tensor.device == device]
        entries = torch.cat([tensors[number].reshape(-1) for number in there]).cpu()
        sizes = [tensors[number].numel() for number in there]
        for number, flat in zip(there, entries.split(sizes), strict=True):
            tensors[number] = flat.reshape(tensors[number].shape).clone()
    return tensors


def _do(task: Task, pcas: Iterable[AnyPCA]) -> None:
    together(work for pca in pcas for work in pca.works(task))
