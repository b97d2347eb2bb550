"""The engine on one machine: so many worker processes with so many threads each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from evatune.compare.engine import Job, Outcome
from evatune.compare.worker import work
from evatune.errors import EvaError
from evatune.settings import EngineSettings

PATIENCE = 60.0
"""Seconds that a run has to save a checkpoint when the sweep is interrupted."""


def gpu_names(count: int) -> list[str]:
    """Return so many accelerators as CUDA_VISIBLE_DEVICES names them: the first of those that it names already.

    Raises:
        EvaError: it is set and names fewer.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(map(str, range(count)))
    named = [name for name in visible.split(",") if name]
    if len(named) < count:
        raise EvaError(
            f"--gpus is {count}, but CUDA_VISIBLE_DEVICES={','.join(named)} names {len(named)}; give --gpus "
            f"{len(named)}, or name more."
        )
    return named[:count]


def gpus_of(worker: int, names: Sequence[str], processes: int) -> Sequence[str]:
    """Return the accelerators of a worker, one for each process; there are at least so many.

    Example:
        >>> [gpus_of(worker, ["0", "1", "2", "3"], 2) for worker in range(3)]
        [['0', '1'], ['2', '3'], ['0', '1']]
    """
    start = worker % (len(names) // processes) * processes
    return names[start : start + processes]


class LocalEngine:
    """Worker processes on this machine; see `evatune.compare.engine.Engine`.

    Each worker is a process that does one run at a time. It uses as many GPUs as a run has processes, and workers share
    GPUs where they are few.

    Args:
        settings: how runs are done.
        logs: folder of what the workers print.

    Raises:
        EvaError: CUDA_VISIBLE_DEVICES names fewer GPUs.
    """

    def __init__(self, settings: EngineSettings, *, logs: Path) -> None:
        gpu_names(settings.gpus)
        self.slots, self.logs = settings.workers_here, logs
        self.gpus, self.processes = settings.gpus, settings.processes
        self.threads = settings.threads or max(1, (os.cpu_count() or 1) // (self.slots * self.processes))
        self._context = multiprocessing.get_context("spawn")
        self._free = list(range(self.slots))
        self._workers: dict[int, tuple[Any, Connection]] = {}
        self._busy: dict[Connection, tuple[int, Job]] = {}

    def start(self, job: Job) -> None:
        """Give a job to a free worker."""
        number = self._free.pop(0)
        if number not in self._workers:
            self._workers[number] = self._spawn(number)
        _, connection = self._workers[number]
        self._busy[connection] = number, job
        with suppress(BrokenPipeError):  # `finished` sees that it is dead
            connection.send(job.recipe)

    def finished(self) -> list[tuple[Job, Outcome]]:
        """Wait until a worker is done or dead, and return what became of its job."""
        found = []
        for ready in wait(list(self._busy)):
            connection: Any = ready
            number, job = self._busy.pop(connection)
            try:
                state, reason = connection.recv()
            except (EOFError, ConnectionResetError):
                process, _ = self._workers.pop(number)
                process.join()
                state, reason = "died", f"its process ended with code {process.exitcode}"
            self._free.insert(0, number)
            found.append((job, Outcome(state=state, reason=reason)))
        return found

    def close(self) -> None:
        """End the workers; runs in progress save a checkpoint where they can."""
        for process, connection in self._workers.values():
            if connection in self._busy:
                process.terminate()
            else:
                with suppress(BrokenPipeError):
                    connection.send(None)
        try:
            for process, _ in self._workers.values():
                process.join(PATIENCE)
        finally:  # also if Ctrl-C is pressed again
            for process, _ in self._workers.values():
                process.kill()

    def _spawn(self, number: int) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        environment["TRANSFORMERS_VERBOSITY"] = "error"
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus_of(number, gpu_names(self.gpus), self.processes))
        process = self._context.Process(
            target=work,
            args=(theirs,),
            kwargs={
                "log": str(self.logs / f"worker-{number}.log"),
                "environment": environment,
                "processes": self.processes,
            },
            name=f"evatune-worker-{number}",
        )
        process.start()
        theirs.close()
        return process, ours
