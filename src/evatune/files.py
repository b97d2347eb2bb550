"""Writing files and folders so that a failure leaves nothing half-written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evatune.errors import EvaError

CHECKSUMS = "SHA256SUMS"
"""File with the checksums of a folder's tensors; `sha256sum -c` reads it too."""


def user_cache() -> Path:
    """Return the folder for what can be made again: `EVATUNE_CACHE`, by default `~/.cache/evatune`."""
    return Path(os.environ.get("EVATUNE_CACHE") or "~/.cache/evatune").expanduser()


def check_writable(path: str | Path, *, overwrite: bool = False, holds: str | None = None) -> Path:
    """Check that `path` can become a new file or folder, before any long work is done for it.

    Args:
        path: where something is to be written.
        overwrite: allow that it exists already.
        holds: a file by which a folder shows that it is what may be overwritten; no other folder is, unless empty.

    Returns:
        The path, absolute.

    Raises:
        EvaError: the path exists and `overwrite` is false, it is a folder of something else, or its nearest existing
            parent is not a writable folder.
    """
    path = Path(path).expanduser().absolute()
    if path.exists() and not overwrite:
        raise EvaError(f"{path} exists already; choose another output or allow overwriting (--overwrite).")
    if holds and path.is_dir() and any(path.iterdir()) and not (path / holds).is_file():
        raise EvaError(f"{path} holds no {holds}, so it is something else and not overwritten; choose another output.")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise EvaError(f"cannot write {path}: {parent} is not a writable folder; choose another output.")
    return path


@contextmanager
def replace_folder(path: str | Path, *, holds: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place when the block ends without an exception.

    Args:
        path: the folder to write.
        holds: a file that the folder will hold; a folder that exists without it is not replaced.
        overwrite: replace a folder that exists; it stays untouched until the new one is complete.

    Raises:
        EvaError: see `check_writable`.
    """
    path = check_writable(path, overwrite=overwrite, holds=holds)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        # mkdtemp makes a private folder; what replaces `path` gets the permissions of any other new folder.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def json_text(content: Any, *, indent: int | None = None) -> str:
    """Return plain values as JSON; what is not finite becomes null, since JSON has no word for it."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def write_json(path: str | Path, content: Any, *, indent: int | None = None) -> Path:
    """Write plain values as a JSON file; see `json_text` and `write_bytes`."""
    return write_text(path, json_text(content, indent=indent) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file in UTF-8; see `write_bytes`."""
    return write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file beside its final place and rename it.

    Args:
        path: the file to write; its folder is made if needed.
        content: what it will hold.

    Returns:
        The path.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every safetensors file of a folder into `SHA256SUMS`."""
    files = sorted(folder.glob("*.safetensors"))
    write_text(folder / CHECKSUMS, "".join(f"{_sha256(path)}  {path.name}\n" for path in files))


def check_checksums(folder: Path) -> None:
    """Check the tensors of a folder, if it has checksums.

    Raises:
        EvaError: a file is missing, or is not what was written.
    """
    path = folder / CHECKSUMS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        wanted, _, name = line.partition("  ")
        if not (folder / name).is_file() or _sha256(folder / name) != wanted:
            raise EvaError(
                f"{folder / name} is not the file that {CHECKSUMS} beside it tells of; make the folder again."
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
