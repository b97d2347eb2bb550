"""How the rows of an activation can correspond to the positions of a batch, and which ways agree with a test pass.

Shapes: B samples, T positions, L leading shape of an activation (all dimensions but the last).

A layout is a guess. It is used only if it predicts, row by row, which rows of a batch change with its padding
(`evatune.activations.padding`). Several may agree with one batch, as "(B, T)" and "(T, B)" do where all samples have
the same length; then all are kept until a batch decides between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evatune.activations.positions import BatchPositions


class Marks(NamedTuple):
    """What a layout says of the rows of an activation, each boolean of its leading shape L."""

    counted: Tensor
    """Which rows count."""
    padding: Tensor
    """Which rows change with the values at padded positions."""


Guess = Callable[[Tensor, torch.Size], Tensor | None]
"""Spreads a mask (B, T) over a leading shape, or returns None where it does not fit."""


def _each(mask: Tensor, leading: torch.Size) -> Tensor | None:
    return mask.reshape(leading) if mask.numel() == leading.numel() else None


def _time_first(mask: Tensor, leading: torch.Size) -> Tensor | None:
    turned = mask.movedim(-1, 0)
    return turned.reshape(leading) if leading in (turned.shape, torch.Size([mask.numel()])) else None


def _times(mask: Tensor, leading: torch.Size) -> int:
    """Return how many rows each position has, or 0 if that is not a whole number above 1."""
    number, rest = divmod(leading.numel(), max(mask.numel(), 1))
    return number if number > 1 and not rest else 0


def _repeated(mask: Tensor, leading: torch.Size) -> Tensor | None:
    number = _times(mask, leading)
    return mask.unsqueeze(-1).expand(*mask.shape, number).reshape(leading) if number else None


def _sequence_repeated(mask: Tensor, leading: torch.Size) -> Tensor | None:
    number = _times(mask, leading)
    return mask.unsqueeze(-2).expand(*mask.shape[:-1], number, -1).reshape(leading) if number else None


def _batch_repeated(mask: Tensor, leading: torch.Size) -> Tensor | None:
    number = _times(mask, leading)
    return mask.expand(number, *mask.shape).reshape(leading) if number else None


def _with_others(rest: bool, *, first: bool) -> Guess:
    """Return the layout of a sequence with further rows before it if `first`, else after it; their marks are `rest`."""

    def spread(mask: Tensor, leading: torch.Size) -> Tensor | None:
        n_others = (leading[-1] if len(leading) > 1 else 0) - mask.shape[-1]
        if n_others <= 0 or leading[:-1].numel() != mask.shape[:-1].numel():
            return None
        others = mask.new_full((*mask.shape[:-1], n_others), rest)
        return torch.cat([others, mask] if first else [mask, others], dim=-1).reshape(leading)

    return spread


@dataclass(frozen=True)
class _Kind:
    spread: Guess
    others: Guess | None = None
    """Spreads the rows that change with padding, if these are not simply the rows that do not count."""
    has_others: bool = False
    """Whether there are rows that stand for no position."""


_KINDS = {
    "(B, T)": _Kind(_each),
    "(T, B)": _Kind(_time_first),
    "each position several times": _Kind(_repeated),
    "each sequence several times": _Kind(_sequence_repeated),
    "the batch several times": _Kind(_batch_repeated),
    "others behind": _Kind(_with_others(True, first=False), has_others=True),
    "others in front": _Kind(_with_others(True, first=True), has_others=True),
    "filled up behind": _Kind(_with_others(False, first=False), _with_others(True, first=False), has_others=True),
    "filled up in front": _Kind(_with_others(False, first=True), _with_others(True, first=True), has_others=True),
}


@dataclass(frozen=True)
class Layout:
    """One way in which rows stand for the positions of one sequence."""

    kind: str
    sequence: int

    @property
    def has_others(self) -> bool:
        """Whether there are rows that stand for no position."""
        return _KINDS[self.kind].has_others

    def marks(self, positions: BatchPositions, leading: torch.Size) -> Marks | None:
        """Return what this layout says of an activation with this leading shape, or None where it does not fit."""
        if self.sequence >= len(positions.sequences):
            return None
        sequence = positions.sequences[self.sequence]
        kind = _KINDS[self.kind]
        counted = kind.spread(sequence.counted, leading)
        kept = (kind.others or kind.spread)(sequence.kept, leading)
        return None if counted is None or kept is None else Marks(counted, ~kept)

    def n_more(self, positions: BatchPositions, leading: torch.Size, more: int) -> int | None:
        """Return how many more rows there must be if the sequence is longer by `more` positions.

        None means unknown: the model pads the sequence to some length of its own.
        """
        sequence, kind = positions.sequences[self.sequence].kept, _KINDS[self.kind]
        n_samples = sequence.shape[:-1].numel()
        if kind.others is not None:
            return None
        times = 1 if kind.has_others else leading.numel() // max(sequence.numel(), 1)
        return n_samples * times * more


@dataclass(frozen=True)
class NotOfPositions:
    """No row stands for a position of a sequence with padding: pictures, pooled vectors, rows without padding."""

    n_rows: int
    n_samples: int
    """Both as in the batch that showed this."""

    def fits(self, n_rows: int, n_samples: int) -> bool:
        """Tell whether a sample of another batch has as many rows; if not, this result does not hold for it."""
        return n_rows * self.n_samples == self.n_rows * n_samples


Learned = tuple[Layout, ...] | NotOfPositions


def may_be_filled_up(positions: BatchPositions, leading: torch.Size) -> bool:
    """Tell whether each sequence has more rows than positions, so that the model may have padded it."""
    kinds = [kind.spread for kind in _KINDS.values() if kind.others is not None]
    return any(spread(sequence.kept, leading) is not None for sequence in positions.sequences for spread in kinds)


def is_not_filled_up(grown: int, positions: BatchPositions, more: Sequence[int]) -> bool:
    """Tell whether the number of rows has grown exactly with the length of a sequence."""
    sequences = zip(positions.sequences, more, strict=True)
    return grown in [sequence.kept.shape[:-1].numel() * number for sequence, number in sequences]


class Seen(NamedTuple):
    """What was seen of one activation."""

    leading: torch.Size
    changed: Tensor
    """Which rows changed with the values at padded positions, boolean, L."""
    n_rows_longer: int | None
    """How many rows it has if every sequence is longer or shorter; None if unknown."""


def agreeing(seen: Seen, positions: BatchPositions, more: Sequence[int] | None) -> Learned | None:
    """Return the layouts that agree with what was seen.

    Args:
        seen: what was seen.
        positions: positions of the batch.
        more: by how many positions each sequence was longer for `seen.n_rows_longer`.

    Returns:
        All layouts that agree (an empty tuple if none does), or `NotOfPositions`; None if only a batch of another
        length can decide.
    """
    n_rows, n_samples = seen.leading.numel(), positions.n_samples
    grown = None if seen.n_rows_longer is None or more is None else seen.n_rows_longer - n_rows
    any_changed = bool(seen.changed.any())
    if not any_changed:
        if n_rows <= n_samples or grown == 0:
            return NotOfPositions(n_rows, n_samples)
        if grown is None:
            return None
    fitting: list[tuple[Layout, Tensor]] = []
    for index in range(len(positions.sequences)):
        for kind in _KINDS:
            layout = Layout(kind, index)
            marks = layout.marks(positions, seen.leading)
            if marks is not None:
                fitting.append((layout, marks.padding.to(seen.changed.device)))
    found = [layout for layout, padding in fitting if not any_changed or torch.equal(padding, seen.changed)]
    is_certain = any_changed and bool(found)
    if not found:  # a row of padding may stay the same; a row that counts must
        found = [layout for layout, padding in fitting if not bool((seen.changed & ~padding).any())]
    if is_certain and not any(layout.has_others for layout in found):
        return tuple(found)
    if found and grown is None:
        return None
    grown_by = [number * n_samples for number in more or ()]
    by_growth = []
    for layout in found:
        expected = layout.n_more(positions, seen.leading, more[layout.sequence] if more else 0)
        # The other rows may belong to another sequence, which has grown too.
        others = sum(grown_by) - grown_by[layout.sequence] if layout.has_others and grown_by else 0
        if expected is not None and grown in (expected, expected + others):
            by_growth.append(layout)
    if by_growth or not is_certain:
        return tuple(by_growth)
    # If the growth is no multiple of that of the sequence, the model pads rows to a length of its own.
    filled = [layout for layout in found if layout.n_more(positions, seen.leading, 0) is None]
    return tuple(layout for layout in filled if not grown or not grown_by or grown % grown_by[layout.sequence])
