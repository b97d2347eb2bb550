"""On how many processor threads factorizations run: each on one, and many side by side.

A factorization that is spread over threads waits for them longer than it works, and stalls where other work has taken
a processor. Those of different inputs do not need each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run what is inside on one processor thread."""
    n_threads = torch.get_num_threads()
    if n_threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if n_threads > 1:
            torch.set_num_threads(n_threads)


def on_one_thread_each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return what a function gives for each item; as many run at a time as torch may use threads, each on one of them.

    Raises:
        Exception: what the function raises for the first item that it fails for.
    """
    items = list(items)
    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(items) < 2:
        with one_thread():
            return [function(item) for item in items]
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(n_threads)  # what threads to come start with is set by the last call of any
