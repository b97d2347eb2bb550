"""Reading prompts and completions from local files or from a hub."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from evatune.errors import EvaError, near_misses
from evatune.tasks.generation.formats import Example, find_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Examples(Sequence[Example]):
    """Examples in their seeded order."""

    items: tuple[Example, ...]
    """The examples."""
    sources: tuple[str, ...]
    """Where they come from."""
    dropped: int
    """Rows left out because they have no answer."""

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        return self.items[index]

    def summary(self) -> str:
        """Return one line: how many examples, from where, how many rows were dropped."""
        dropped = f" ({self.dropped} without an answer dropped)" if self.dropped else ""
        return f"{len(self)} examples from {', '.join(Path(source).name for source in self.sources)}{dropped}"


def load_examples(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: str = "auto",
    limit: int | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: str = "train",
    hub_config: str | None = None,
) -> Examples:
    """Read examples and put them into a random order that depends on the seed alone.

    Args:
        sources: files (.jsonl, .json, .csv, .tsv, .parquet), which are mixed, or a hub data set id.
        format: a key of `FORMATS`, or `auto`: what the fields of each source's first row fit.
        limit: keep the first so many of the shuffled examples.
        seed: of the order.
        tokenizer: writes conversations (`messages`) with its chat template.
        split: split of a hub data set.
        hub_config: configuration of a hub data set.

    Returns:
        The examples; rows without an answer are dropped and counted.

    Raises:
        EvaError: a source is missing or unreadable, its fields do not fit, or no example is left.
    """
    names = [os.fspath(source) for source in ([sources] if isinstance(sources, str | os.PathLike) else sources)]
    items: list[Example] = []
    dropped = 0
    for name in names:
        rows = iter(_rows(name, split=split, hub_config=hub_config))
        form = None
        for row in rows:
            form = form or find_format(format, row, source=name, tokenizer=tokenizer)
            example = form.convert(row)
            if example is None:
                dropped += 1
            else:
                items.append(example)
    if not items:
        raise EvaError(f"{', '.join(names) or 'the data'} holds no usable example ({dropped} rows without an answer).")
    random.Random(seed).shuffle(items)
    return Examples(items=tuple(items[:limit]), sources=tuple(names), dropped=dropped)


def _rows(name: str, *, split: str, hub_config: str | None) -> Iterator[dict[str, Any]]:
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise EvaError(f"cannot read {path}: its ending must be one of {', '.join(_SUFFIXES)}.")
        yield from _file_rows(path)
    elif path.is_dir():
        found = sorted(child.name for child in path.iterdir() if child.suffix in _SUFFIXES)
        raise EvaError(f"{path} is a folder; name its files one by one (there are: {', '.join(found) or 'none'}).")
    elif path.suffix in _SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        siblings = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        raise EvaError(f"there is no data file {path}{near_misses(path.name, siblings)}.")
    else:
        yield from _hub_rows(name, split=split, hub_config=hub_config)


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = content if isinstance(content, list) else next(iter(content.values()), None)
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise EvaError(f"{path} must hold a list of objects.")
            yield from rows
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _json_line(line, where=f"{path}, line {number}")
        else:
            with path.open(encoding="utf-8", newline="") as file:
                yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise EvaError(f"cannot read {path}: {error}.") from error


def _json_line(line: str, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaError(f"{where} is not JSON: {error}.") from None
    if not isinstance(row, dict):
        raise EvaError(f"{where} is not a JSON object.")
    return row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise EvaError(f"reading {path} needs the Python package pyarrow; run: pip install pyarrow.") from None
    try:
        yield from parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise EvaError(f"cannot read {path}: {str(error).splitlines()[0]}.") from error


def _hub_rows(name: str, *, split: str, hub_config: str | None) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise EvaError(
            f"there is no data file {name}, and a hub data set needs the Python package datasets; "
            "run: pip install 'evatune[hub]'."
        ) from None
    try:
        yield from datasets.load_dataset(name, hub_config, split=split)
    except Exception as error:  # the hub client raises errors of many libraries
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EvaError(
            f"there is no data file {name}, and it cannot be loaded from a hub: {reason.rstrip('.')}."
        ) from error
