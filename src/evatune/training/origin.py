"""What a run was started on: which model, by some of its weights, and which data, by the contents of their files."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evatune.errors import EvaError
from evatune.files import write_json
from evatune.fingerprint import is_other_model
from evatune.recipe import Recipe
from evatune.tasks.rows import is_pattern

FILE_NAME = "origin.json"
"""Its file, in a run's folder and beside each adapter."""


def data_of(recipe: Recipe) -> dict[str, list[str]]:
    """Return a hash of each file or folder that the recipe's data name, by setting; hub data sets have none.

    Cost: the files are read once; of folders, names and sizes alone are.
    """
    found: dict[str, list[str]] = {}
    for field in dataclasses.fields(recipe.data):  # type: ignore[arg-type]
        value = getattr(recipe.data, field.name)
        if field.metadata.get("path") and value:
            paths = [Path(item).expanduser() for item in ([value] if isinstance(value, str) else value)]
            paths = [Path(file) for path in paths for file in _matching(path)]
            found[field.name] = [content_hash(path) for path in paths if path.exists()]
    return found


def _matching(path: Path) -> list[str]:
    """Return the files that a pattern means, or the path itself."""
    return sorted(glob.glob(str(path), recursive=True)) if not path.exists() and is_pattern(str(path)) else [str(path)]


def held_out_and_trained(recipe: Recipe) -> list[str]:
    """Return the names of the files that a recipe trains on and scores on; folders may have both in parts."""
    train, held_out = (getattr(recipe.data, name) for name in ("train", "eval"))
    return sorted({Path(name).name for name in set(train) & set(held_out) if Path(name).is_file()})


def write_origin(folder: Path, *, weights: Mapping[str, list[float]], data: Mapping[str, list[str]]) -> None:
    """Write what `check_model` and `check_data` read."""
    write_json(folder / FILE_NAME, {"weights": weights, "data": data})


def fingerprints(*, weights: Mapping[str, list[float]], data: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return what the record of a run keeps of the same, and a hash of the sources of evatune.

    Cost: the sources are read, less than a megabyte.
    """
    code = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    short = 16
    return {
        "model": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:short],
        "data": {name: [value[:short] for value in values] for name, values in data.items()},
        "code": code.hexdigest()[:short],
    }


def check_model(folder: str | Path, model: Any) -> None:
    """Check that what is in a folder was made for this model.

    Args:
        folder: of a run or an adapter; one without origin, such as another library writes, is let pass.
        model: the base model, without adapter.

    Raises:
        EvaError: it is another model.
    """
    kept = _read(folder).get("weights") or {}
    if is_other_model(kept, model):
        raise EvaError(
            f"what is in {folder} was made for another model: the weights differ; give that model, or --force to go on "
            "all the same."
        )


def check_data(folder: str | Path, now: Mapping[str, list[str]]) -> None:
    """Check that files of data are those that a run was started with.

    Args:
        folder: of the run.
        now: what `data_of` returns.

    Raises:
        EvaError: some changed; they are named.
    """
    kept = _read(folder).get("data") or {}
    changed = [f"data.{name}" for name in kept if kept[name] != now.get(name)]
    if changed:
        raise EvaError(
            f"cannot resume {folder}: the files of {' and '.join(changed)} have changed since the run was started; "
            "restore them, start again, or --force to go on with them."
        )


def _read(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except ValueError as error:
        raise EvaError(f"{path} is damaged; delete it to go on without it.") from error


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file; of a folder, that of the names and sizes of its files."""
    if path.is_dir():
        names = sorted(f"{item.relative_to(path)} {item.stat().st_size}" for item in path.rglob("*") if item.is_file())
        return hashlib.sha256("\n".join(names).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
