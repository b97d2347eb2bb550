"""Functions for many streaming PCAs at once: their factorizations run side by side (`evatune.pca.together`).

A PCA that has seen no rows is skipped. Beside them, `on_host` copies many tensors at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from evatune.pca.contract import AnyPCA
from evatune.pca.together import Task, together


def settle_all(pcas: Iterable[AnyPCA]) -> None:
    """Do the work that `AnyPCA.add` has left, for all of them."""
    _do(Task.SETTLE, pcas)


def look_all(pcas: Iterable[AnyPCA]) -> None:
    """Find the present components of all of them, which `AnyPCA.look` then returns at no cost."""
    _do(Task.LOOK, pcas)


def learn_all(pcas: Iterable[AnyPCA]) -> None:
    """Refresh, and find the final components."""
    pcas = list(pcas)
    _do(Task.REFRESH, pcas)
    _do(Task.LEARN, pcas)


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
