"""How many CPU threads a factorization uses: one each, and many factorizations run side by side.

A factorization that is spread over threads waits for them longer than it works, and stalls if other work occupies a
core. Factorizations of different inputs do not depend on each other.
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
    """Run the `with` block on one CPU thread."""
    n_threads = torch.get_num_threads()
    if n_threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if n_threads > 1:
            torch.set_num_threads(n_threads)


def on_one_thread_each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the result of a function for each item; as many calls run at a time as torch has threads, one thread each.

    Raises:
        Exception: the exception of the first item for which the function fails.
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
        torch.set_num_threads(n_threads)  # new threads start with the number that any thread has set last
