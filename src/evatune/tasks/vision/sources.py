"""Where labelled pictures come from: folders of classes, tables, lists, idx files, scikit-learn, or a hub."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evatune.errors import EvaError, near_misses
from evatune.tasks.rows import may_be_hub_id

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""Endings of the files in a folder that are pictures."""
_TABLES = (".parquet", ".arrow")
_LISTS = (".txt", ".csv", ".tsv")
FILES = _TABLES + _LISTS
"""Endings of the files that can be read."""
_IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "file_name", "path")
_LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
_SPLITS = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid", "eval")}
"""Names of folders that mean a split."""
_IDX_PREFIX = {"train": "train", "test": "t10k"}
DIGITS = "sklearn:digits"
"""The digits that come with scikit-learn."""

Content = Path | bytes | np.ndarray
"""A file, an encoded picture, or pixels: (height, width) or (height, width, channels), 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One labelled picture that has not been read yet."""

    name: str
    """What errors call it."""
    label: int | str
    """Name of its class, or a number if the source has no names."""
    read: Callable[[], Content]
    """Returns what there is to decode."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Labelled pictures in the order of their source."""

    pictures: tuple[Picture, ...]
    """The pictures."""
    classes: tuple[str, ...] | None = None
    """Names of all its classes in their order, where it has names."""


Derive = Callable[[Mapping[str, Any]], int]
"""Makes a label from a row."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table are read; by default those with a usual name."""

    image: str | None = None
    """Column of the pictures."""
    label: str | None = None
    """Column of the labels."""
    derive: Derive | None = None
    """Makes the label from the row instead."""


def read_source(
    name: str, *, split: str = "train", hub_config: str | None = None, columns: Columns | None = None
) -> Source:
    """Find the labelled pictures of one source; none is decoded.

    Args:
        name: a folder with a folder for each class, or with `train/` and `test/` that have them; a folder of
            .parquet, .arrow or idx files; one such table; a list (.txt with a path and a label a line, .csv or .tsv
            with columns); `sklearn:digits`; or a hub data set id.
        split: which part of a source that has several.
        hub_config: configuration of a hub data set.
        columns: which columns of a table are read.

    Raises:
        EvaError: there is no such source, it holds no picture, a class folder is empty, or a column is missing.
    """
    path, columns = Path(name).expanduser(), columns or Columns()
    if name == DIGITS:
        source = _digits()
    elif path.is_dir():
        source = _folder(path, split=split, columns=columns)
    elif path.is_file():
        source = _file(path, columns)
    elif not may_be_hub_id(name, suffixes=FILES):
        siblings = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        raise EvaError(f"there is no folder or file {path}{near_misses(path.name, siblings)}.")
    else:
        source = _hub(name, split=split, hub_config=hub_config, columns=columns)
    if not source.pictures:
        raise EvaError(f"{name} holds no picture; it needs a folder for each class, or a table of pictures and labels.")
    return source


def has_test_split(name: str) -> bool:
    """Return whether a local source has pictures for testing of its own."""
    path = Path(name).expanduser()
    return path.is_dir() and (_split_folder(path, "test") is not None or bool(_idx_files(path, "test")))


def _folder(path: Path, *, split: str, columns: Columns) -> Source:
    if _idx_files(path, split):
        return _idx(path, split)
    inner = _split_folder(path, split)
    if inner is not None:
        return _folder(inner, split=split, columns=columns)
    tables = sorted(child for child in path.rglob("*") if child.suffix in _TABLES)
    if tables:
        tables = [table for table in tables if split in table.name] or tables
        sources = [_file(table, columns) for table in tables]
        return Source(pictures=tuple(p for source in sources for p in source.pictures), classes=sources[0].classes)
    return _class_folders(path)


def _split_folder(path: Path, split: str) -> Path | None:
    names = (split, *_SPLITS.get(split, ()))
    return next((path / name for name in names if (path / name).is_dir()), None)


def _class_folders(path: Path) -> Source:
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    strays = sorted(child for child in path.iterdir() if child.is_file() and child.suffix.lower() in SUFFIXES)
    if strays:
        raise EvaError(
            f"pictures lie in {path} itself, outside of a class ({len(strays)}, the first is {strays[0].name}); put "
            "each into the folder of its class, or remove them."
        )
    pictures: list[Picture] = []
    for folder in folders:
        files = sorted(child for child in folder.rglob("*") if child.suffix.lower() in SUFFIXES)
        if not files:
            raise EvaError(f"the class folder {folder} holds no picture ({', '.join(SUFFIXES)}); fill or remove it.")
        pictures += [Picture(name=str(file), label=folder.name, read=partial(_same, file)) for file in files]
    return Source(pictures=tuple(pictures), classes=tuple(folder.name for folder in folders))


def _file(path: Path, columns: Columns) -> Source:
    if path.suffix == ".txt":
        return _list(path)
    if path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        return _rows(rows, where=str(path), folder=path.parent, columns=columns)
    if path.suffix in _TABLES:
        table = _table(path)
        return _rows(
            _TableRows(table),
            where=str(path),
            folder=path.parent,
            columns=columns,
            names=_class_names((table.schema.metadata or {}).get(b"huggingface")),
        )
    raise EvaError(f"cannot read {path}: its ending must be one of {', '.join(FILES)}.")


def _list(path: Path) -> Source:
    """Read lines of a path, relative to the list's own folder, and a label."""
    pictures = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name:
            raise EvaError(f"{path}, line {number}: {line!r} is not a path, a space and a label.")
        file = path.parent / name.strip()
        pictures.append(Picture(name=str(file), label=_label(label), read=partial(_same, file)))
    return Source(pictures=tuple(pictures))


def _rows(
    rows: Sequence[Mapping[str, Any]],
    *,
    where: str,
    folder: Path | None,
    columns: Columns,
    names: Mapping[str, Sequence[str]] | None = None,
) -> Source:
    """Return the pictures of rows; a string in the image column is a path relative to `folder`."""
    found = list(rows[0]) if len(rows) else []
    image = _column(columns.image, _IMAGE_COLUMNS, found, what="image_column", where=where)
    label = ""
    if columns.derive is None:
        label = _column(columns.label, _LABEL_COLUMNS, found, what="label_column", where=where)
    classes = (names or {}).get(label)
    pictures = []
    for number, row in enumerate(rows):
        name, value = f"{where}, row {number}", columns.derive(row) if columns.derive else row[label]
        if value is None or value == "":
            raise EvaError(f"{name} has no label; remove it.")
        value = _label(value)
        if classes is not None:
            if not isinstance(value, int) or not 0 <= value < len(classes):
                raise EvaError(f"{name} has the label {value!r}, but there are names for {len(classes)} classes.")
            value = classes[value]
        pictures.append(Picture(name=name, label=value, read=partial(_cell, rows, number, image, folder)))
    return Source(pictures=tuple(pictures), classes=tuple(classes) if classes is not None else None)


def _column(wanted: str | None, usual: Sequence[str], found: Sequence[str], *, what: str, where: str) -> str:
    names = (wanted,) if wanted else usual
    column = next((name for name in names if name in found), None)
    if column is None:
        hint = near_misses(wanted, found) if wanted else ""
        raise EvaError(
            f"{where} has no column {' or '.join(names)}{hint}; it has {', '.join(found) or 'no rows'}: name one with "
            f"{what}."
        )
    return column


def _label(value: Any) -> int | str:
    """Return a label as a number if it is one, also if it is written as a string."""
    text = str(value).strip()
    return int(text) if text.lstrip("-").isdecimal() else text


def _same(content: Content) -> Content:
    return content


def _cell(rows: Sequence[Mapping[str, Any]], number: int, column: str, folder: Path | None) -> Content:
    value = rows[number][column]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and folder is not None:
        return folder / value
    return value if isinstance(value, bytes) else np.asarray(value, dtype=np.uint8)


class _TableRows(Sequence[Mapping[str, Any]]):
    """Rows of an Arrow table; each is converted to Python values when it is read."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        return self.table.slice(index, 1).to_pylist()[0]


def _table(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise EvaError(
            f"reading {path} needs the Python package pyarrow; run: pip install 'evatune[vision]'."
        ) from None
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path)
        with pyarrow.memory_map(str(path)) as file:
            try:
                return ipc.open_stream(file).read_all()
            except pyarrow.ArrowInvalid:
                return ipc.open_file(file).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise EvaError(f"cannot read {path}: {str(error).splitlines()[0].rstrip('.')}.") from error


def _class_names(metadata: bytes | None) -> dict[str, list[str]]:
    """Return the names of classes that the library datasets writes into a table, by column."""
    features = json.loads(metadata).get("info", {}).get("features", {}) if metadata else {}
    return {column: feature["names"] for column, feature in features.items() if "names" in feature}


def _hub(name: str, *, split: str, hub_config: str | None, columns: Columns) -> Source:
    try:
        import datasets
    except ImportError:
        raise EvaError(
            f"there is no folder or file {name}, and a hub data set needs the Python package datasets; "
            "run: pip install 'evatune[vision]'."
        ) from None
    from evatune.models.reach import hub_in_reach  # only here: models are of torch

    try:
        with hub_in_reach():
            dataset = datasets.load_dataset(name, hub_config, split=split)
    except Exception as error:  # the hub client raises errors of many libraries
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EvaError(
            f"there is no folder or file {name}, and it cannot be loaded from a hub: {reason.rstrip('.')}."
        ) from error
    names = {}
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.ClassLabel):
            names[column] = feature.names
    return _rows(dataset, where=f"{name} ({split})", folder=None, columns=columns, names=names)


def _idx_files(path: Path, split: str) -> list[Path]:
    prefix = _IDX_PREFIX.get(split, split)
    return [file for kind in ("images-idx3", "labels-idx1") for file in sorted(path.glob(f"{prefix}-{kind}-ubyte*"))]


def _idx(path: Path, split: str) -> Source:
    """Read the two files of a split in the format of MNIST, as they are or compressed."""
    files = _idx_files(path, split)
    if len(files) != 2:
        raise EvaError(f"{path} must hold one file of images and one of labels for {split!r}, and has {len(files)}.")
    images, labels = map(_idx_array, files)
    if len(images) != len(labels):
        raise EvaError(f"{files[0]} holds {len(images)} pictures, but {files[1]} {len(labels)} labels.")
    return _arrays(images, labels, where=str(files[0]))


def _idx_array(path: Path) -> np.ndarray:
    """Return an array of bytes: two zero bytes, type 8, the number of dimensions, each dimension in 4 bytes, values."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        zeros, kind, ndim = int.from_bytes(content[:2], "big"), content[2], content[3]
        shape = np.frombuffer(content, ">u4", count=ndim, offset=4).astype(int)
        if zeros or kind != 8:
            raise ValueError("it is not an idx file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise EvaError(f"cannot read {path}: {error}.") from error


def _digits() -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise EvaError(f"{DIGITS} needs the Python package scikit-learn; run: pip install scikit-learn.") from None
    bunch = load_digits()
    return _arrays((bunch.images * (255 / 16)).round().astype(np.uint8), bunch.target, where=DIGITS)


def _arrays(images: np.ndarray, labels: np.ndarray, *, where: str) -> Source:
    return Source(
        pictures=tuple(
            Picture(name=f"{where}, picture {number}", label=int(label), read=partial(_same, images[number]))
            for number, label in enumerate(labels)
        )
    )
