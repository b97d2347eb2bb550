"""Rows of data sets: from JSON, CSV and Parquet files or from a hub, each with its place, for error messages."""

from __future__ import annotations

import csv
import glob
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evatune.errors import EvaError, near_misses

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Endings of the files that can be read."""
_ROWS_AT_A_TIME = 1000
"""Rows of parquet and arrow files that are in memory together."""
_NO_DATA = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files that `datasets` writes beside data (`save_to_disk`)."""

_SPLIT = re.compile(
    r"(train(ing)?|valid(ation)?|val|dev|eval(uation)?|test(ing)?|held_?out)(?![a-z])", flags=re.IGNORECASE
)
"""Beginnings of names of files and folders that tell the split."""

Row = dict[str, Any]


class NoSourceError(EvaError):
    """There is neither a file nor a data set on a hub of this name, or the hub cannot be asked."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"there is no data file {name}, and it cannot be loaded from a hub: {reason}.")
        self.name = name


def read_rows(
    name: str, *, split: str = "train", hub_config: str | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield the rows of one source, each with its place (file and line), for error messages.

    Args:
        name: a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow) or a hub data set id; `files_of` finds the files of a
            folder or pattern. Quotes mean nothing in a .tsv file.
        split: split of a hub data set.
        hub_config: configuration of a hub data set.
        columns: what the source calls the columns that are wanted: wanted name -> its name. Numbers, from 1 on, mean
            that a .csv or .tsv file has no header.

    Raises:
        EvaError: there is no such source, or it cannot be read; the sentence names the line.
    """
    columns = columns or {}
    for where, row in _source(name, split=split, hub_config=hub_config, has_header=not _numbered(columns)):
        for wanted, column in columns.items():
            if column not in row:
                raise EvaError(f"{where} has no column {column!r}{near_misses(column, row)}; it has {_listed(row)}.")
            row = row | {wanted: row[column]}
        yield where, row


def files_of(name: str, *, split: str) -> list[str]:
    """Return the data files of a folder or of a pattern (`data/*.jsonl`, `data/**/part-?.parquet`), else the name.

    Args:
        name: of a source.
        split: if there is a folder of this name inside, or names of files begin with it, only these are taken; all
            files where no name tells a split.

    Raises:
        EvaError: the folder holds no data file, or only those of other splits, or nothing fits the pattern.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if split and (path / split).is_dir():
            return files_of(str(path / split), split=split)
        found = [child for child in sorted(path.rglob("*")) if child.suffix in SUFFIXES and child.is_file()]
        found = [child for child in found if child.name not in _NO_DATA]
        if not found:
            raise EvaError(f"the folder {path} holds no data file; their endings are {', '.join(SUFFIXES)}.")
        own = [child for child in found if child.name.startswith(split)]
        names = [str(child.relative_to(path)) for child in found]
        others = [name for name in names if any(_SPLIT.match(part) for part in Path(name).parts)]
        if others and not own and path.name != split:  # what is learned must not be scored on
            raise EvaError(
                f"the folder {path} has no files of split {split!r}; it has {_listed(others[:5])}"
                f"{', ...' if others[5:] else ''}; set the split, or name its files."
            )
        return [str(child) for child in own or found]
    if is_pattern(name) and not path.exists():
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise EvaError(f"no file fits the pattern {name!r}.")
        return [file for match in matches for file in files_of(match, split=split)]
    return [name]


def is_pattern(name: str) -> bool:
    """Return whether a name has the placeholders of a pattern of files: `*`, `?` or `[...]`."""
    return any(sign in name for sign in "*?[")


def is_here(path: str | Path) -> bool:
    """Return whether there is such a file or folder, or one that fits such a pattern."""
    return Path(path).exists() or (is_pattern(str(path)) and bool(glob.glob(str(path), recursive=True)))


def may_be_hub_id(name: str, *, suffixes: Sequence[str] = SUFFIXES) -> bool:
    """Return whether a name can mean a data set on a hub: it is neither a file here, nor can it only be meant as one.

    Args:
        name: of a source.
        suffixes: endings of data files.
    """
    path = Path(name).expanduser()
    only_a_path = path.suffix in suffixes or is_pattern(name) or name.startswith((".", "/", "~")) or name.count("/") > 1
    return not only_a_path and not path.exists()


def _source(name: str, *, split: str, hub_config: str | None, has_header: bool) -> Iterator[tuple[str, Row]]:
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in _READERS:
            raise EvaError(f"cannot read {path}: its ending must be one of {', '.join(SUFFIXES)}.")
        try:
            yield from _READERS[path.suffix](path, has_header=has_header)
        except OSError as error:
            raise EvaError(f"cannot read {path}: {error.strerror or error}.") from error
    elif not may_be_hub_id(name):
        siblings = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        raise EvaError(f"there is no data file {path}{near_misses(path.name, siblings)}.")
    else:
        yield from _hub_rows(name, split=split, hub_config=hub_config)


def _jsonl_rows(path: Path, *, has_header: bool) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parsed(line, where=where)
        if not isinstance(row, dict):
            raise EvaError(f"{where} is not a JSON object.")
        yield where, row


def _json_rows(path: Path, *, has_header: bool) -> Iterator[tuple[str, Row]]:
    content = _parsed("".join(line for _, line in _lines(path)), where=str(path))
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    rows = lists[0] if len(lists) == 1 else None
    if not isinstance(rows, list):
        raise EvaError(f"{path} must hold a list of objects, or one object in which there is one such list.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise EvaError(f"{path} must hold a list of objects, and item {number} is a {type(row).__name__}.")
        yield f"{path}, item {number}", row


def _csv_rows(path: Path, *, has_header: bool) -> Iterator[tuple[str, Row]]:
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"strict": True}
    reader = csv.reader((line for _, line in _lines(path)), **form)
    names: list[str] | None = None
    with _long_fields():
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise EvaError(f"{path}, line {reader.line_num} is not CSV: {error}.") from None
            if names is None:
                names = values if has_header else [str(number) for number in range(1, len(values) + 1)]
                if has_header:
                    continue
            where = f"{path}, line {reader.line_num}"
            if not values:
                continue
            if len(values) != len(names):
                raise EvaError(f"{where} has {len(values)} fields, and the first line has {len(names)}.")
            yield where, dict(zip(names, values, strict=True))


def _parquet_rows(path: Path, *, has_header: bool) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise EvaError(f"reading {path} needs the Python package pyarrow; run: pip install pyarrow.") from None
    try:
        with parquet.ParquetFile(path) as file:
            yield from _placed(path, file.iter_batches(batch_size=_ROWS_AT_A_TIME))
    except ArrowException as error:
        raise EvaError(f"cannot read {path}: {str(error).splitlines()[0]}.") from error


def _arrow_rows(path: Path, *, has_header: bool) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
    except ImportError:
        raise EvaError(f"reading {path} needs the Python package pyarrow; run: pip install pyarrow.") from None
    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                whole = pyarrow.ipc.open_file(file)
                batches = (whole.get_batch(number) for number in range(whole.num_record_batches))
            except pyarrow.ArrowInvalid:  # data sets in the cache of `datasets` are streams
                file.seek(0)
                batches = iter(pyarrow.ipc.open_stream(file))
            yield from _placed(path, batches)
    except pyarrow.ArrowException as error:
        raise EvaError(f"cannot read {path}: {str(error).splitlines()[0]}.") from error


def _placed(path: Path, batches: Iterator[Any]) -> Iterator[tuple[str, Row]]:
    """Yield the rows of arrow batches, of which only some are values of Python at a time."""
    number = 0
    for batch in batches:
        for begin in range(0, batch.num_rows, _ROWS_AT_A_TIME):
            for row in batch.slice(begin, _ROWS_AT_A_TIME).to_pylist():
                number += 1
                yield f"{path}, row {number}", row


def _hub_rows(name: str, *, split: str, hub_config: str | None) -> Iterator[tuple[str, Row]]:
    try:
        import datasets
    except ImportError:
        raise EvaError(
            f"there is no data file {name}, and a hub data set needs the Python package datasets; "
            "run: pip install 'evatune[hub]'."
        ) from None
    from evatune.models.reach import hub_in_reach  # only here: models are of torch

    try:
        with hub_in_reach():
            rows = datasets.load_dataset(name, hub_config, split=split)
        names = _names_in_lists(getattr(rows, "features", None))
        for number, row in enumerate(rows, start=1):
            tags = {column: [known[value] for value in row[column]] for column, known in names.items()}
            yield f"{name}, {split} row {number}", row | tags
    except EvaError:
        raise
    except Exception as error:  # the hub client raises errors of many libraries
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise NoSourceError(name, reason.rstrip(".")) from error


def _names_in_lists(features: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Return the names of the classes that lists of class numbers hold, such as the tags of words, by column."""
    inner = {column: getattr(feature, "feature", None) for column, feature in (features or {}).items()}
    return {column: known for column, feature in inner.items() if (known := getattr(feature, "names", None))}


_READERS: dict[str, Callable[..., Iterator[tuple[str, Row]]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file in UTF-8, with their numbers; a byte order mark is skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise EvaError(
                    f"{path}, line {number} is not UTF-8 text (byte 0x{line[error.start]:02x}); convert the file."
                ) from None


def _parsed(text: str, *, where: str) -> Any:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if ", line " in where else f"line {error.lineno}, column {error.colno}"
        raise EvaError(f"{where} is not JSON: {error.msg} at {place}.") from None
    except RecursionError:
        raise EvaError(f"{where} is not JSON that can be read: it is nested too deeply.") from None
    if "\\ud" in text.lower():  # an escape may be half of a surrogate pair, which no tokenizer accepts
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise EvaError(
                f"{where} holds half of a surrogate pair, which is not valid Unicode; repair or remove the row."
            ) from None
    return content


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift Python's limit of 131,072 characters in a CSV field."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _numbered(columns: Mapping[str, str]) -> bool:
    return bool(columns) and all(column.isdigit() for column in columns.values())


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))
