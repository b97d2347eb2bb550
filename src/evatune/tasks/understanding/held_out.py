"""The held-out examples and which set each is from, since several sets have scores of their own."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evatune.tasks.examples import Convert, Examples, gather
from evatune.tasks.rows import Row, files_of, may_be_hub_id
from evatune.tasks.understanding.settings import UnderstandingData


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out examples in their seeded order."""

    examples: Examples[Any] = field(default_factory=Examples)
    """The examples."""
    sets: tuple[str, ...] = ()
    """The set of each example: a split of a hub data set or of a folder, or a file."""


def read_held_out(data: UnderstandingData, converter: Callable[[Row, str], Convert[Any]], *, seed: int) -> HeldOut:
    """Read the held-out examples.

    Args:
        data: names files, or a folder or hub data set and its splits, joined by plus signs.
        converter: is given the first row of each file and its name, and returns what makes examples of its rows.
        seed: of the order.

    Raises:
        EvaError: see `gather`.
    """

    def convert(row: Row, source: str, file: str) -> Convert[Any]:
        return converter(row, file)

    if data.validate:
        examples = gather(data.train, convert, seed=seed, **data.reading("validation"))
        return HeldOut(examples=examples, sets=("validation",) * len(examples))
    if not data.eval:
        return HeldOut()
    places = [(source, split) for source in data.eval for split in _splits(source, data.eval_split.split("+"))]
    limit, options = data.max_eval_examples, data.reading("held out")
    parts = [
        gather(source, convert, seed=seed, **options | {"split": split, "limit": limit if len(places) == 1 else None})
        for source, split in places
    ]
    marked = [(name, item) for name, part in zip(_names(places), parts, strict=True) for item in part]
    if len(parts) > 1:
        random.Random(seed).shuffle(marked)
    return HeldOut(
        examples=Examples(
            items=tuple(item for _, item in marked[:limit]),
            sources=data.eval,
            dropped=sum(part.dropped for part in parts),
        ),
        sets=tuple(name for name, _ in marked[:limit]),
    )


def _splits(source: str, wanted: list[str]) -> list[str]:
    """Return the wanted splits of a source, or an empty name for all of one that is not divided into them."""
    if may_be_hub_id(source):
        return wanted
    whole = files_of(source, split="")
    return [split for split in wanted if files_of(source, split=split) != whole] or [""]


def _names(places: list[tuple[str, str]]) -> list[str]:
    """Return a short name for each set: the split, the file without folder and ending, or both if need be."""
    short = [split or Path(source).stem for source, split in places]
    counts = Counter(short)
    long = [f"{source} {split}".strip() for source, split in places]
    return [one if counts[one] == 1 else other for one, other in zip(short, long, strict=True)]
