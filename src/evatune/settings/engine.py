"""The options of a sweep's engine: what does the runs of `evatune compare`, and how many at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evatune.errors import EvaError
from evatune.settings.section import Section, number


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Section):
    """How the runs of a sweep are done."""

    engine: Literal["local", "ray"] = "local"
    """What does the runs: processes of this machine, or tasks of a Ray cluster."""
    workers: int | None = number(None, low=1)
    """Runs at a time; by default 1, with GPUs as many as have theirs, and on a cluster as many as there is room for."""
    threads: int | None = number(None, low=1)
    """Processor threads of each process; by default its share of the processors, and on a cluster 1."""
    processes: int = number(1, low=1)
    """Processes of each run, which share its batches; with GPUs, each has one of its own."""
    gpus: int = number(0, low=0)
    """GPUs that local workers share, or that each run of a cluster has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus and (self.gpus < self.processes or (self.engine == "ray" and self.gpus > self.processes)):
            raise EvaError(
                f"--gpus is {self.gpus} and --processes {self.processes}, but each process of a run has one GPU; give "
                f"--processes {self.gpus}, or other --gpus."
            )

    @property
    def workers_here(self) -> int:
        """Runs at a time on this machine."""
        return self.workers or max(1, self.gpus // self.processes)
