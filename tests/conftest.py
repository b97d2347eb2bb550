"""What every test needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="session", autouse=True)
def one_thread_for_all_tests() -> Iterator[None]:
    """Factorizations of tiny matrices stall for seconds with two threads on a busy machine, in torch and in NumPy."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(n_threads)
