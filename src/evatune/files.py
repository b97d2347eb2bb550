"""Writing files and folders so that a failure leaves nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evatune.errors import EvaError


def user_cache() -> Path:
    """Return the folder for cached files: `EVATUNE_CACHE`, by default `~/.cache/evatune`."""
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
    _check_nearest(path, path.parent)
    return path


def check_takes_files(folder: str | Path) -> None:
    """Check that files can be added to a folder, which may be there already, before any long work is done for them.

    Raises:
        EvaError: it is a file, or the nearest folder that exists cannot be written.
    """
    folder = Path(folder).expanduser().absolute()
    _check_nearest(folder, folder)


def _check_nearest(path: Path, folder: Path) -> None:
    """Check that the nearest existing parent of a folder, or the folder itself, takes what `path` will be."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or not _takes_files(folder):
        raise EvaError(f"cannot write {path}: {folder} is not a writable folder; choose another output.")


def _takes_files(folder: Path) -> bool:
    """Try it with an empty file: some folders, such as /proc, are writable by their rights alone.

    A full disk passes: what writes there tells it, with a way out.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: str | Path, *, way_out: str = "make room, or choose another output") -> Iterator[None]:
    """Turn failures of writing inside the block into one sentence; all other errors pass.

    Args:
        path: the file or folder that is written.
        way_out: what the user can do.

    Raises:
        EvaError: the disk is full, read-only or gone.
    """
    try:
        yield
    except EvaError:
        raise
    except Exception as error:
        reason = write_failure(error, Path(path))
        if reason is None:
            raise
        raise EvaError(f"cannot write {path}: {reason}; {way_out}.") from error


_OF_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def write_failure(error: BaseException, path: Path) -> str | None:
    """Return why a file or folder could not be written, in the system's words; None for an error of another kind."""
    if isinstance(error, ConnectionError):  # a pipe or a network, no disk
        return None
    if isinstance(error, OSError):
        name = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
        related = path in (name, *name.parents) or name in path.parents or name.name.startswith(f".{path.name}-")
        return error.strerror or str(error) if related or error.errno in _OF_DISK else None
    # safetensors and torch write with code of their own.
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(number[1]))
    of_torch = re.search(r"inline_container|iostream error|PytorchStreamWriter", str(error))
    return "a file ends early, as on a full disk" if of_torch else None


@contextmanager
def replace_folder(path: str | Path, *, holds: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place when the block ends without an exception.

    Every `.safetensors` file in it gets a checksum, see `check_tensors`.

    Args:
        path: the folder to write.
        holds: a file that the folder will hold; a folder that exists without it is not replaced.
        overwrite: replace a folder that exists; it stays untouched until the new one is complete.

    Raises:
        EvaError: see `check_writable`.
    """
    path = check_writable(path, overwrite=overwrite, holds=holds)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _beside(path) as temporary:
            yield temporary
            _take_place(temporary, path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, path: Path) -> None:
    """Rename a complete folder to its place."""
    for tensors in temporary.rglob("*.safetensors"):
        seal_tensors(tensors)
    # mkdtemp makes a private folder; the folder at `path` gets the permissions of any other new folder.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    temporary.rename(path)


def json_text(content: Any, *, indent: int | None = None) -> str:
    """Return plain values as JSON; numbers that are not finite become null, since JSON cannot express them."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def write_json(path: str | Path, content: Any, *, indent: int | None = None) -> Path:
    """Write plain values as a JSON file; see `json_text` and `write_bytes`."""
    return write_text(path, json_text(content, indent=indent) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> Path:
    """Write plain values as a file of JSON lines; see `json_text` and `write_bytes`."""
    return write_text(path, "".join(json_text(row) + "\n" for row in rows))


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

    Raises:
        EvaError: it cannot be written.
    """
    path = Path(path).expanduser()
    with writing(path):
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


_CHECKSUM = "evatune_sha256"
"""Key of the checksum in a `.safetensors` file's metadata, which all readers of the format ignore."""


def seal_tensors(path: str | Path) -> None:
    """Put a checksum of names, shapes and values into a `.safetensors` file; after an error the file is unchanged.

    Cost: the file is read and written once.
    """
    path = Path(path)
    header, start = _header(path)
    metadata = header.pop("__metadata__", {}) | {_CHECKSUM: _checksum(path, header, start)}
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as target, path.open("rb") as source:
            target.write(len(text).to_bytes(8, "little") + text)
            source.seek(start)
            shutil.copyfileobj(source, target, _CHUNK)
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_tensors(path: str | Path) -> None:
    """Check the `.safetensors` file at `path`, or all in a folder, against the checksum that each was written with.

    A file without a checksum (written by another program) is only checked for its length.

    Raises:
        EvaError: a file is not what was written.
    """
    path = Path(path)
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        header, start = _header(file)
        metadata = header.pop("__metadata__", {})
        if _CHECKSUM in metadata and metadata[_CHECKSUM] != _checksum(file, header, start):
            raise EvaError(
                f"{file} is damaged or cut short: its checksum is not that of what was written; make it again."
            )


def write_checksums(folder: str | Path) -> Path:
    """Write `checksums.json` with the checksum of every other file in a folder: a folder that has it is complete."""
    folder = Path(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _CHECKSUMS)
    return write_json(
        folder / _CHECKSUMS, {str(file.relative_to(folder)): _sha256(file, 0) for file in files}, indent=1
    )


def damaged_files(folder: str | Path) -> list[str] | None:
    """Return the files of a folder that have changed since `write_checksums`; None if it was never called on it."""
    folder = Path(folder)
    if not (folder / _CHECKSUMS).is_file():
        return None
    try:
        kept = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
    except ValueError:
        return [_CHECKSUMS]
    return [name for name, value in kept.items() if not (folder / name).is_file() or _sha256(folder / name, 0) != value]


_CHECKSUMS = "checksums.json"
_CHUNK = 1 << 22


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a `.safetensors` file, and where its tensors begin."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length) if 0 < length <= path.stat().st_size else b"")
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, AttributeError, KeyError, TypeError):
        raise EvaError(f"{path} is damaged or cut short: it is no file of tensors; make it again.") from None
    if 8 + length + max(ends, default=0) != path.stat().st_size:
        raise EvaError(f"{path} is damaged or cut short: its length is not what its header says; make it again.")
    return header, 8 + length


def _checksum(path: Path, header: dict[str, Any], start: int) -> str:
    return _sha256(path, start, json.dumps(header, sort_keys=True).encode())


def _sha256(path: Path, start: int, first: bytes = b"") -> str:
    digest = hashlib.sha256(first)
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
