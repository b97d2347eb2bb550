"""What does the runs: the protocol of an engine, what it is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evatune.compare.runs import Run


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run on its way to a worker."""

    run: Run
    folder: Path
    recipe: dict[str, Any]
    """What `Recipe.to_dict` returned."""
    spectra: str | None
    """Key of the spectra that this run measures for others."""
    tries: int
    """How often it has been started, this time included."""
    started: float
    """Time of the start, in seconds of `time.perf_counter`."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job."""

    state: str
    """`done`, `refused`, `failed` or `died`."""
    reason: str = ""
    """Why it is not done."""


class Engine(Protocol):
    """What does runs: processes of this machine, or a cluster."""

    slots: int
    """Runs at a time."""
    threads: int
    """Processor threads of each process of a run."""

    def start(self, job: Job) -> None:
        """Start a job; at most `slots` are started and not finished."""

    def finished(self) -> list[tuple[Job, Outcome]]:
        """Wait until at least one job is finished."""

    def close(self) -> None:
        """Stop everything that was started."""
