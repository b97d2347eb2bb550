"""What one worker process does: it runs recipes one after another, and says what became of each."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from evatune.interruption import interrupt


def work(connection: Connection, *, log: str, environment: dict[str, str], processes: int = 1) -> None:
    """Run recipes until there are no more.

    Args:
        connection: gives recipes as plain values, and takes for each a state and a reason.
        log: file for everything that is printed.
        environment: variables that are set before PyTorch is loaded.
        processes: processes of each run.
    """
    os.environ.update(environment)
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in a terminal is for the sweep, which then sends one signal, so that a checkpoint is saved
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    signal.signal(signal.SIGTERM, interrupt)
    try:
        while (recipe := connection.recv()) is not None:
            connection.send(attempt(recipe, processes=processes))
    except (KeyboardInterrupt, EOFError):
        return


def attempt(content: dict[str, Any], *, processes: int = 1) -> tuple[str, str]:
    """Run one recipe; go on with what an interrupted run left, if that is possible.

    Args:
        content: what `Recipe.to_dict` returned.
        processes: processes that do the run together; a single one is this one.

    Returns:
        `done`, `refused`, `failed` or `died`, and why.
    """
    from evatune.compare.launched import ProcessEndedError, finetune_together
    from evatune.errors import EvaError
    from evatune.recipe import Recipe
    from evatune.training.run import finetune

    run: Callable[..., Any] = finetune if processes == 1 else partial(finetune_together, processes=processes)
    try:
        recipe = Recipe.from_dict(content)
        folder = Path(recipe.output)
        print(f"\n{folder}", file=sys.stderr, flush=True)
        if (folder / "checkpoints").is_dir() or (folder / "run.json").is_file():
            try:
                run(recipe, resume=True)
                return "done", ""
            except EvaError as error:
                print(f"started again, since: {error}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        run(recipe)
    except EvaError as error:
        return "refused", str(error)
    except ProcessEndedError as error:
        return "died", str(error)
    except KeyboardInterrupt:
        raise
    except Exception as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        _free_memory()
    return "done", ""


def _free_memory() -> None:
    """Free what the last run left: a model and its trainer refer to each other."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
