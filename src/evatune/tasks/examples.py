"""Examples from the rows of several sources, in an order that depends only on the seed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

from evatune.errors import EvaError
from evatune.tasks.disk_list import empty_list, selected
from evatune.tasks.rows import Row, files_of, read_rows

Item = TypeVar("Item")
Part = Literal["all", "training", "validation"]
_PART_SEED = 20241010
Convert = Callable[[Row], Item | None]
"""Makes an example of a row, or None if the row has no question or no answer."""


@dataclass(frozen=True, kw_only=True)
class Examples(Sequence[Item], Generic[Item]):
    """Examples in their seeded order."""

    items: Sequence[Item] = ()
    """The examples."""
    sources: tuple[str, ...] = ()
    """Where they come from."""
    dropped: int = 0
    """Rows left out because they have no question or no answer."""

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        return tuple(self.items[index]) if isinstance(index, slice) else self.items[index]

    def summary(self) -> str:
        """Return one line: how many examples, from where, how many rows were dropped."""
        dropped = f" ({self.dropped:,} without a question or an answer dropped)" if self.dropped else ""
        return f"{len(self):,} examples from {', '.join(short_names(self.sources))}{dropped}"


def gather(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    converter: Callable[[Row, str, str], Convert[Item]],
    *,
    limit: int | None = None,
    seed: int = 0,
    split: str = "train",
    hub_config: str | None = None,
    columns: Mapping[str, str] | None = None,
    places: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    part: Part = "all",
    share: float = 0.2,
    on_disk: bool = False,
) -> Examples[Item]:
    """Read examples and shuffle them in an order that depends only on the seed.

    Args:
        sources: files, folders and patterns, which are mixed, or a hub data set id; see `read_rows` and `files_of`.
        converter: is given the first row of each file, the name of its source and that of the file, and returns what
            makes examples of its rows.
        limit: keep the first so many of the shuffled examples.
        seed: of the order.
        split: split of a hub data set.
        hub_config: configuration of a hub data set.
        columns: see `read_rows`.
        places: for sources that are no files or hub ids themselves: the arguments of `read_rows` for each of their
            files.
        part: of the examples, the same for every seed: `validation` are a share of them, `training` the others.
        share: this share.
        on_disk: keep the examples in a temporary file, not in memory.

    Returns:
        The examples; rows without a question or an answer are dropped and counted.

    Raises:
        EvaError: a source is missing or unreadable, a row does not fit, no example is left, or the disk is full.
    """
    names = [os.fspath(source) for source in ([sources] if isinstance(sources, str | os.PathLike) else sources)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvaError(f"{twice[0]} is named twice, so its examples would count double; name it once.")
    items = empty_list(on_disk=on_disk)
    dropped = 0
    for name in names:
        own = [] if name in (places or {}) else files_of(name, split=split)
        found = [{"name": file, "split": split, "hub_config": hub_config} for file in own]
        for place in (places or {}).get(name, found):
            for example in _converted(place, converter, source=name, columns=columns):
                if example is None:
                    dropped += 1
                else:
                    items.append(example)
    if not len(items):
        if not dropped:
            raise EvaError(f"{', '.join(names) or 'the data'} holds no rows at all.")
        rows = "1 row" if dropped == 1 else f"{dropped} rows"
        raise EvaError(
            f"{', '.join(names) or 'the data'} holds no usable example ({rows} without a question or an answer)."
        )
    order = list(range(len(items)))
    if part != "all":
        chosen = set(random.Random(_PART_SEED).sample(order, max(1, round(share * len(items)))))
        order = [number for number in order if (number in chosen) == (part == "validation")]
    random.Random(seed).shuffle(order)
    return Examples(items=selected(items, order[:limit]), sources=tuple(names), dropped=dropped)


def _converted(
    place: Mapping[str, Any],
    converter: Callable[[Row, str, str], Convert[Item]],
    *,
    source: str,
    columns: Mapping[str, str] | None,
) -> Iterator[Item | None]:
    """Yield the example of each row of a file, or None for a row without a question or an answer."""
    convert: Convert[Item] | None = None
    for where, row in read_rows(**place, columns=columns):
        convert = convert or converter(row, source, place["name"])
        try:
            example = convert(row)
        except EvaError as error:
            raise EvaError(f"{where}: {error}") from None
        yield example


def short_names(sources: Sequence[str]) -> list[str]:
    """Return the names of files and tasks without folders, unless two share a name."""
    names = [Path(source).name for source in sources]
    return [
        name if names.count(name) == 1 else str(Path(Path(source).parent.name) / name)
        for source, name in zip(sources, names, strict=True)
    ]
