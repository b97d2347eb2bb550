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


def on_one_thread_each(action: Callable[[T], None], items: Iterable[T]) -> None:
    """Do something to every item, as many at a time as torch may use threads, each on one of them.

    Raises:
        Exception: what the action raises for the first item that it fails for.
    """
    items = list(items)
    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(items) < 2:
        for item in items:
            action(item)
        return
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(action, items))
    finally:
        torch.set_num_threads(n_threads)  # what threads to come start with is set by the last call of any
