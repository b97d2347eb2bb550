"""Processes that `torchrun` or `accelerate launch` started together: one of them writes and prints for all.

A launcher tells each process its number in environment variables. Without them, and in a script of one's own without a
process group, there is one process, and everything here does nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from evatune.errors import EvaError
from evatune.interruption import ENDS_TOGETHER, KEEPS, held_interrupts


def n_launched() -> int:
    """Return how many processes the launcher has started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_as() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if n_launched() > 1 else 0


def go_alone() -> None:
    """Forget the launcher, so that this process and those it starts work alone."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


@contextmanager
def together() -> Iterator[None]:
    """Let the processes that were launched talk to each other while the block runs.

    Each gets the accelerator of its number, where there are any.

    Raises:
        EvaError: there are fewer accelerators than processes.
    """
    if n_launched() == 1:
        yield
        return
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        here, device = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
        if device >= here:
            raise EvaError(
                f"process {launched_as()} has no GPU of its own, since this machine has {here}; start as many "
                "processes as there are GPUs, or set CUDA_VISIBLE_DEVICES= to run on the CPU."
            )
        torch.cuda.set_device(device)
        backend = "nccl"
    distributed.init_process_group(backend)
    yield
    distributed.destroy_process_group()  # after an error the others may be gone, and the process ends anyway


def n_processes() -> int:
    """Return how many processes work together."""
    distributed = _distributed()
    return distributed.get_world_size() if distributed is not None else 1


def number() -> int:
    """Return the number of this one among the processes that work together, from 0."""
    distributed = _distributed()
    return distributed.get_rank() if distributed is not None else 0


def is_first() -> bool:
    """Return whether this is the process that writes and prints."""
    return number() == 0


def wait() -> None:
    """Wait until all processes have come here."""
    distributed = _distributed()
    if distributed is not None:
        distributed.barrier()


def any_of(value: bool) -> bool:
    """Return whether the value is true in any process."""
    distributed = _distributed()
    if distributed is None:
        return value
    import torch

    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    found = torch.tensor([int(value)], device=device)
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return bool(found.item())


def result_protected() -> AbstractContextManager[Any]:
    """Return a context to measure and save in: Ctrl-C ends the first, and more presses do not destroy the second."""
    return held_interrupts(held=KEEPS if n_processes() == 1 else ENDS_TOGETHER)


@contextmanager
def only_first_prints() -> Iterator[None]:
    """Print nothing in processes that are not the first; an exception that leaves the block is printed as ever."""
    if launched_as() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def says_first(message: str) -> bool:
    """Return whether no other process has ended with this message, and let the others know of it."""
    store = _store()
    if store is None:
        return True
    store.add("evatune/ended", 1)
    return bool(store.add(f"evatune/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1)


def another_ended() -> bool:
    """Return whether another process has ended with a message of its own, so that errors here only follow from that."""
    store = _store()
    return store is not None and store.add("evatune/ended", 0) > 0


def _distributed() -> Any:
    """Return torch's module where there is a group of several processes, else None."""
    module = sys.modules.get("torch.distributed")  # without torch there is no group
    if module is None or not module.is_available() or not module.is_initialized() or module.get_world_size() == 1:
        return None
    return module


def _store() -> Any:
    """Return the launcher's table of keys and values; None if there is none or it cannot be reached."""
    if n_launched() == 1:
        return None
    from torch.distributed import TCPStore

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
    except (KeyError, ValueError, RuntimeError):
        return None
