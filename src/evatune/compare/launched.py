"""A run of several processes: torchrun starts `evatune finetune`, whose training goes through accelerate."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evatune.errors import EvaError
from evatune.files import write_json
from evatune.recipe import Recipe

PATIENCE = 50.0
"""Seconds that the processes have to save a checkpoint when they are interrupted."""


class ProcessEndedError(Exception):
    """A process of the run broke or was killed, so that all of them ended."""


def finetune_together(recipe: Recipe, *, processes: int, resume: bool = False) -> None:
    """Do a run in several processes, one GPU each where there are any.

    Args:
        recipe: the run, with its output.
        processes: how many share each batch.
        resume: go on from the last checkpoint in the output folder.

    Raises:
        EvaError: what the run itself says is wrong.
        ProcessEndedError: a process broke or was killed; what it printed is on standard error.
        KeyboardInterrupt: Ctrl-C; the processes have saved a checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = write_json(Path(folder) / "recipe.yaml", recipe.with_absolute_paths().to_dict())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "evatune", "finetune", str(path), "--json", *(["--resume"] if resume else [])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_ends_with_parent())
        try:
            answer, _ = process.communicate()
        except BaseException:
            process.terminate()  # the launcher tells all, which save a checkpoint
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()
            raise
    if process.returncode:
        if error := _error_in(answer):
            raise EvaError(error)
        raise ProcessEndedError(f"one of its {processes} processes ended early")


def _error_in(answer: str) -> str:
    """Return the sentence of `{"error": sentence}`; an empty one where the run said nothing."""
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return ""


def _ends_with_parent() -> Callable[[], Any] | None:
    """Return what lets the system end the launcher, and so its processes, if the worker that started it is killed."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return lambda: library.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
