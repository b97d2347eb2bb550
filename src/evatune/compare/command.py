"""What `evatune compare` opens: a sweep and an engine, both checked before any work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from evatune.compare.engine import Engine
from evatune.compare.results import RUNS
from evatune.compare.sweep import Sweep
from evatune.settings import EngineSettings, takes


def open_sweep(path: str, *, output: str | None = None) -> Sweep:
    """Return a sweep, with another folder for its results if one is given."""
    sweep = Sweep.load(path)
    return dataclasses.replace(sweep, output=output) if output else sweep


@takes(EngineSettings)
def open_engine(sweep: Sweep, *, settings: EngineSettings | None = None, **options: Any) -> Engine:
    """Return the engine that does the runs; its processes start with the first of them.

    Args:
        sweep: its folder gets what the workers print.
        settings: all options in one object; the options below change it.
        options: see the list below.

    Raises:
        EvaError: a number is out of range, CUDA_VISIBLE_DEVICES names fewer GPUs, or Ray is missing.
    """
    settings = EngineSettings.of(options, settings=settings, call="evatune.compare.command.open_engine")
    if settings.engine == "ray":
        from evatune.compare.cluster import RayEngine

        return RayEngine(settings)
    from evatune.compare.local import LocalEngine

    return LocalEngine(settings, logs=Path(sweep.output) / RUNS)
