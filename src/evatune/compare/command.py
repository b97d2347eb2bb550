"""What `evatune compare` opens: a sweep and an engine, both checked before any work."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

from evatune.compare.engine import Engine
from evatune.compare.results import RUNS
from evatune.compare.sweep import Sweep
from evatune.errors import EvaError


def open_sweep(path: str, *, output: str | None = None) -> Sweep:
    """Return a sweep, with another folder for its results if one is given."""
    sweep = Sweep.load(path)
    return dataclasses.replace(sweep, output=output) if output else sweep


def n_workers(given: int | None, *, gpus: int, processes: int) -> int:
    """Return how many runs go on at a time on this machine: those asked for, or one for each set of accelerators."""
    return given or max(1, gpus // max(1, processes))


def open_engine(
    sweep: Sweep,
    *,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    threads: int | None = None,
    gpus: int = 0,
    processes: int = 1,
) -> Engine:
    """Return the engine that does the runs; its processes start with the first of them.

    Args:
        sweep: its folder gets what the workers print.
        engine: processes of this machine, or tasks of a Ray cluster.
        workers: runs at a time; by default 1, with accelerators as many as have theirs, and on a cluster as many as
            there is room for.
        threads: processor threads of each process; by default its share of the processors, and on a cluster 1.
        gpus: accelerators that local workers share, or that each run of a cluster has.
        processes: processes of each run, which share its batches; with accelerators, each has one of its own.

    Raises:
        EvaError: a number is out of range, CUDA_VISIBLE_DEVICES names fewer GPUs, or Ray is missing.
    """
    for name, value, low in (
        ("workers", workers, 1),
        ("threads", threads, 1),
        ("gpus", gpus, 0),
        ("processes", processes, 1),
    ):
        if value is not None and value < low:
            raise EvaError(f"--{name} is {value}, but must be at least {low}.")
    if gpus and (gpus < processes or (engine == "ray" and gpus > processes)):
        raise EvaError(
            f"--gpus is {gpus} and --processes {processes}, but each process of a run has one GPU; give --processes "
            f"{gpus}, or other --gpus."
        )
    if engine == "ray":
        from evatune.compare.cluster import RayEngine

        return RayEngine(workers=workers, threads=threads or 1, gpus=gpus, processes=processes)
    from evatune.compare.local import LocalEngine, gpu_names

    workers = n_workers(workers, gpus=gpus, processes=processes)
    gpu_names(gpus)
    share = max(1, (os.cpu_count() or 1) // (workers * processes))
    logs = Path(sweep.output) / RUNS
    return LocalEngine(workers=workers, threads=threads or share, logs=logs, gpus=gpus, processes=processes)
