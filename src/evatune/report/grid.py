"""Module names laid out as layers × matrices.

A name such as `model.layers.12.mlp.down_proj` has three parts: the stack of layers (`model.layers`), the index of the
layer (12) and the path inside it (`mlp.down_proj`). The first number of a name is the layer; later numbers, as those of
experts, are part of the path and are shown as `*`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile

import numpy as np

__all__ = ["Grid", "Place", "grid", "locate"]

OUTSIDE = "no layer"
"""Title of the column of targets outside any numbered layer."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a target stands in a grid."""

    row: str
    """Title of the row: "12", "decoder 12" if there are several stacks, or the name of a module outside all layers."""
    column: str
    """The matrix, as it is shown: the shortest end of its path that no other matrix shares."""
    stack: str | None
    """The list that the layer is in, such as "model.layers"; None outside all layers."""
    index: int
    """Number of the layer; -1 outside all layers."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One number for each layer and matrix."""

    rows: list[str]
    """Titles of the rows: the layers of each stack in ascending order, then modules outside all layers."""
    columns: list[str]
    """Titles of the columns, in the order of the model."""
    values: np.ndarray
    """Mean of the values in each cell, (rows, columns); NaN in a cell without a target."""
    counts: np.ndarray
    """Number of targets in each cell, (rows, columns); more than one for the experts of a layer."""
    breaks: list[int]
    """Rows before which another stack begins."""


def locate(names: Iterable[str]) -> dict[str, Place]:
    """Split module names into layer and matrix.

    Args:
        names: module names, in the order of the model.

    Returns:
        Where each name stands; titles are as short as all names together allow.

    Example:
        >>> places = locate(["model.layers.0.self_attn.q_proj", "lm_head"])
        >>> [(place.row, place.column) for place in places.values()]
        [('0', 'q_proj'), ('lm_head', 'no layer')]
    """
    parts = {name: _split(name) for name in names}
    stacks = _distinct_middles({stack for stack, _, _ in parts.values() if stack is not None})
    matrices = _distinct_ends({path for stack, _, path in parts.values() if stack is not None})
    places = {}
    for name, (stack, index, path) in parts.items():
        if stack is None:
            places[name] = Place(row=name, column=OUTSIDE, stack=None, index=-1)
        else:
            row = f"{stacks[stack]} {index}".strip()
            places[name] = Place(row=row, column=matrices[path], stack=".".join(stack), index=index)
    return places


def grid(values: Mapping[str, float]) -> Grid:
    """Lay one value per target out as layers × matrices.

    Args:
        values: a number for each target name, in the order of the model.

    Returns:
        The grid.
    """
    places = locate(values)
    stacks = {place.stack: number for number, place in reversed(list(enumerate(places.values())))}
    stacks[None] = len(places)  # modules outside all layers come below the layers
    ordered = sorted(places.values(), key=lambda place: (stacks[place.stack], place.index))
    rows = list(dict.fromkeys(place.row for place in ordered))
    columns = _columns(places.values())
    total, counts = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)), dtype=int)
    for name, place in places.items():
        cell = rows.index(place.row), columns.index(place.column)
        total[cell] += values[name]
        counts[cell] += 1
    stack_of = {place.row: place.stack for place in ordered}
    breaks = [i for i in range(1, len(rows)) if stack_of[rows[i]] != stack_of[rows[i - 1]]]
    mean = np.divide(total, counts, out=np.full(total.shape, np.nan), where=counts > 0)
    return Grid(rows=rows, columns=columns, values=mean, counts=counts, breaks=breaks)


Path = tuple[str, ...]


def _columns(places: Collection[Place]) -> list[str]:
    """Return the columns in the order of the model; a matrix that only some layers have keeps its place in them."""
    columns: list[str] = []
    before: Place | None = None
    for place in places:
        if place.stack is not None and place.column not in columns:
            follows = before is not None and before.row == place.row
            columns.insert(columns.index(before.column) + 1 if before and follows else len(columns), place.column)
        before = place
    return columns + [OUTSIDE] * any(place.stack is None for place in places)


def _split(name: str) -> tuple[Path | None, int, Path]:
    """Return stack, layer and path inside the layer; the stack is None if no part of the name is a number."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None:
        return None, -1, tuple(parts)
    path = tuple("*" if part.isdecimal() else part for part in parts[first + 1 :])
    # A bare number, as in nn.Sequential, is a layer that is one matrix; it is called after its stack.
    return tuple(parts[:first]), int(parts[first]), path or tuple(parts[:first][-1:]) or ("layer",)


def _distinct_ends(paths: set[Path]) -> dict[Path, str]:
    """Return the shortest end of each path that is the end of no other path of the same length or longer."""
    titles: dict[Path, str] = {}
    for length in count(1):
        ends = defaultdict(list)
        for path in paths:
            ends[path[-length:]].append(path)
        titles |= {same[0]: ".".join(end) for end, same in ends.items() if len(same) == 1 and same[0] not in titles}
        if len(titles) == len(paths):
            return titles
    raise AssertionError  # paths are distinct, so they end differently at their full length at the latest


def _distinct_middles(paths: set[Path]) -> dict[Path, str]:
    """Return each path without the parts at both ends that all paths share."""
    start = _n_shared(list(paths))
    end = _n_shared([path[start:][::-1] for path in paths])
    return {path: ".".join(path[start : len(path) - end]) for path in paths}


def _n_shared(paths: Sequence[Path]) -> int:
    """Return how many leading parts all paths share."""
    return len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))))
