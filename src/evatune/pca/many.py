"""Functions for many streaming PCAs at once: their factorizations run side by side (`evatune.pca.together`).

A PCA that has seen no rows is skipped. Beside them, `groups_of` limits how many are worked on at a time, and `on_host`
copies many tensors at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from evatune.pca.contract import AnyPCA
from evatune.pca.together import ACCELERATOR_BYTES, Task, together

Key = TypeVar("Key")


def settle_all(pcas: Iterable[AnyPCA]) -> None:
    """Do the work that `AnyPCA.add` has left, for all of them."""
    _do(Task.SETTLE, pcas)


def look_all(pcas: Iterable[AnyPCA]) -> None:
    """Find the present components of all of them, which `AnyPCA.look` then returns at no cost."""
    _do(Task.LOOK, pcas)


def learn_all(pcas: Iterable[AnyPCA]) -> None:
    """Refresh, and find the final components."""
    numbered = dict(enumerate(pcas))
    for group in groups_of(numbered):
        _do(Task.REFRESH, (numbered[number] for number in group))
        _do(Task.LEARN, (numbered[number] for number in group))
        if len(group) < len(numbered):
            for number in group:
                numbered[number].rest()


def groups_of(pcas: Mapping[Key, AnyPCA]) -> Iterator[list[Key]]:
    """Yield the keys of PCAs in groups, so that an accelerator factorizes each group at once.

    A caller that does all its work with one group, and lets it `rest` before the next, never holds the eigenpairs of
    all sketches. On the CPU, which has more memory and less of a hurry, all are one group.
    """
    group: list[Key] = []
    n_bytes = 0
    for key, pca in pcas.items():
        size = sum(work.n_bytes for work in pca.works(Task.REFRESH) if work.device.type != "cpu")
        if group and n_bytes + size > ACCELERATOR_BYTES:
            yield group
            group, n_bytes = [], 0
        group.append(key)
        n_bytes += size
    if group:
        yield group


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
