"""Functions for many streaming PCAs at once: their factorizations run side by side (`evatune.pca.together`).

A PCA that has seen no rows is skipped.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def _do(task: Task, pcas: Iterable[AnyPCA]) -> None:
    together(work for pca in pcas for work in pca.works(task))
