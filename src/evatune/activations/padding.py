"""Which rows of an activation are padding, learned from what a model does with the values at padded positions.

A row counts if and only if it comes from a position that the batch's mask keeps. A model may repeat positions, put time
first, flatten, shorten or join sequences, so shapes do not show which rows these are. Therefore the first batch with
padding is passed a second time, with other values at its padding. If the model masks its padding, the rows of padding
change and all other rows stay the same. If a layout (`evatune.activations.layouts`) predicts exactly these changes, it
is used from then on, without a further pass, for as long as it fits. If no row changed, a batch of another length shows
whether the number of rows depends on the length of the sequence at all.

If no layout agrees, as for rows that are routed to experts, frames of speech, or a model that reads its padding, the
padding is removed instead: samples of equal length pass together, and all rows count. If a batch cannot be cut like
this, all rows count, and a warning names the targets concerned and how many of their rows may be padding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evatune.activations.layer_type import TargetModule
from evatune.activations.layouts import (
    Layout,
    Learned,
    Marks,
    NotOfPositions,
    Seen,
    agreeing,
    is_not_filled_up,
    may_be_filled_up,
)
from evatune.activations.positions import BatchPositions, Given
from evatune.activations.sharing import SeenTensors
from evatune.errors import EvaWarning
from evatune.pca.products import unrounded

Place = tuple[str, int, int]
"""One activation of a pass: a target, the number of the call, and the number of the tensor in it."""

TOLERANCE = 1e-5
"""A row has changed if it moved by more than this share of its norm. With equal shapes, equal rows are computed in the
same way, so rows that do not depend on padding are mostly equal bit for bit; on accelerators, sums in random order may
move rows by 1e-6."""
N_DIRECTIONS = 3
"""Rows are compared along this many random directions: each row takes a few numbers, and no change is orthogonal to all
of the directions."""


@dataclass
class RowCounts:
    """How the rows of one input were counted."""

    n_dropped: int = 0
    """Rows that were left out."""
    n_unsure: int = 0
    """Rows that count and may be padding."""
    is_parted: bool = False
    """Whether samples were passed without their padding."""

    @property
    def padding(self) -> str:
        """What happened to the padding: "none" (there was none), "dropped", "removed" before the pass, or "unknown"."""
        if self.n_unsure:
            return "unknown"
        return "removed" if self.is_parted else "dropped" if self.n_dropped else "none"


class Prints:
    """A few numbers for every row of the activations of a pass; they serve to compare the rows of two passes."""

    def __init__(self) -> None:
        self.of: dict[Place, Tensor] = {}
        self.leading: dict[Place, torch.Size] = {}
        self._seen = SeenTensors()
        self._known: dict[tuple[int, int], Tensor] = {}

    def add(self, name: str, number: int, tensors: Sequence[Tensor]) -> None:
        """Keep the numbers for the activations of one call; a shared tensor is read once."""
        for index, tensor in enumerate(tensors):
            key = (self._seen.number(tensor), tensor.shape[-1])
            if key not in self._known:
                self._known[key] = fingerprint(tensor)
            self.of[name, number, index] = self._known[key]
            self.leading[name, number, index] = tensor.shape[:-1]

    def watcher(self, targets: Iterable[TargetModule]) -> Callable[[str, int, Any], None]:
        """Return a function that keeps these numbers for every call of these targets."""
        by_name = {target.name: target for target in targets}

        def watch(name: str, number: int, entering: Any) -> None:
            target = by_name[name]
            self.add(name, number, target.layer.activations(target.module, entering))

        return watch


def fingerprint(tensor: Tensor) -> Tensor:
    """Return a few numbers that identify each row of an activation (L, d), (n, numbers); the norm is last."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    if not tensor.is_floating_point():
        return torch.cat([rows.double(), rows.new_ones(len(rows), 1, dtype=torch.float64)], dim=1)
    generator = torch.Generator().manual_seed(rows.shape[1])
    directions = torch.randn(rows.shape[1], N_DIRECTIONS, generator=generator, device="cpu")
    directions = directions.to(rows.device, non_blocking=True)
    with unrounded(rows.device):  # rounded to TF32, a difference of 1e-6 may grow beyond the tolerance
        rows = rows.float()
        return torch.cat([rows @ directions, rows.norm(dim=1, keepdim=True)], dim=1)


def changed_rows(before: Tensor, after: Tensor) -> Tensor:
    """Return which rows differ between two fingerprints, (n,)."""
    lengths = torch.maximum(before[:, -1], after[:, -1])
    return (before[:, :-1] - after[:, :-1]).abs().amax(dim=1) > TOLERANCE * lengths


class CountedRows:
    """Decides which rows of each activation count, and learns this from batches.

    Attributes:
        open: inputs whose rows of this batch have not been taken, because their padding is not known yet.
        counts: how the rows of each input were counted.
    """

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.counts: dict[str, RowCounts] = {}
        self._learned: dict[Place, Learned] = {}
        self._irregular: set[str] = set()
        self._unfilled: set[Place] = set()
        self._unread: set[str] = set()
        self._positions = BatchPositions()
        self._begin_evidence(self._positions)

    def begin_batch(self, positions: BatchPositions, *, parted: bool = False) -> None:
        """Prepare for a batch, or for a part of one from which padding was removed."""
        self._positions, self._parted, self._takes_all = positions, parted, set[str]()
        self._may_be_filled_up: dict[torch.Size, bool] = {}
        self._marks: dict[tuple[Layout, torch.Size], Marks | None] = {}
        self._begin_evidence(positions)
        self.open = set()
        for name in set(positions.unread) - self._unread:
            self._unread.add(name)
            warnings.warn(
                f"{name!r} in the batches is not understood; if it marks padding, the padding is counted as rows; say "
                "with row_mask= which rows count.",
                EvaWarning,
                stacklevel=2,
            )

    def _begin_evidence(self, positions: BatchPositions) -> None:
        self._shown = positions
        self._plain, self._perturbed, self._longer = Prints(), Prints(), Prints()
        self._more: Sequence[int] | None = None
        self.is_probed = self.lengths_are_probed = False

    def begin_pass(self) -> None:
        """Prepare for one more pass of the batch."""
        self.open = set()

    # -- what passes showed -------------------------------------------------------------------------------------------

    def show_perturbed(
        self, perturbed: Prints, *, plain: Prints | None = None, shown: BatchPositions | None = None
    ) -> None:
        """Learn from a pass with other values at the padding.

        Args:
            perturbed: prints of that pass.
            plain: prints of the pass to compare it with; by default the pass that is measured.
            shown: the positions in both passes; by default those of the batch.
        """
        self._perturbed, self.is_probed = perturbed, True
        if plain is not None and shown is not None:
            self._plain, self._shown = plain, shown
            self._learn({name for name, _, _ in plain.of})

    def show_lengths(self, longer: Prints, more: Sequence[int] | None) -> None:
        """Learn from a pass in which each sequence was longer by `more` positions; None if no such pass succeeded."""
        self._longer, self._more, self.lengths_are_probed = longer, more, True
        for place, leading in self._plain.leading.items():
            if place in longer.leading and more is not None:
                grown = longer.leading[place].numel() - leading.numel()
                if is_not_filled_up(grown, self._shown, more):
                    self._unfilled.add(place)
        self._learn({name for name, _, _ in self._plain.of})

    def end_pass(self) -> bool:
        """Learn from the whole pass; return whether an open input is known now, so that it helps to repeat the pass."""
        before = len(self._learned)
        self._learn(self.open)
        return len(self._learned) > before and not self.open <= self._irregular

    def take_all(self, keys: set[str]) -> None:
        """Count all rows of these inputs from here on, since nothing shows which are padding."""
        self._takes_all |= keys

    @property
    def has_learned(self) -> bool:
        """Whether any batch has shown which rows are padding."""
        return bool(self._learned)

    @property
    def is_irregular(self) -> bool:
        """Whether there is an input whose padding no layout describes."""
        return bool(self._irregular)

    @property
    def may_learn(self) -> bool:
        """Whether there are open inputs about which more passes may show something."""
        return bool(self.open - self._irregular)

    # -- which rows count ---------------------------------------------------------------------------------------------

    def masks(self, key: str, number: int, tensors: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Return for each tensor of a call which of its rows count, or None for all; None if it is not known yet.

        Args:
            key: the input.
            number: the number of the call in its pass.
            tensors: the activations, (..., d).
        """
        counts = self.counts.setdefault(key, RowCounts())
        counts.is_parted |= self._parted
        places = [(key, number, index) for index in range(len(tensors))]
        if self._positions.given is not None:
            masks = [given_mask(self._positions.given, key, tensor.shape[:-1]) for tensor in tensors]
            counts.n_dropped += _n_dropped(masks)
            return masks
        if self._positions.all_count and not any(map(self._is_strange, places, tensors)):
            return [None for _ in tensors]
        found = self._foretold(key, places, tensors)
        if found is None and not (key in self._takes_all or self._parted):
            self.look_at(key, number, tensors)
            found = self._foretold(key, places, tensors)
        if found is None and self._parted and self._positions.all_count:
            return [None for _ in tensors]
        if found is None and (key in self._takes_all or self._parted):
            counts.n_unsure += sum(tensor.shape[:-1].numel() for tensor in tensors)
            return [None for _ in tensors]
        if found is None:
            self.open.add(key)
            return None
        counts.n_dropped += _n_dropped(found)
        return [None if mask is None or bool(mask.all()) else mask for mask in found]

    def split(self, key: str, new: str) -> None:
        """Begin a new input with all that is known about the input it was split from."""
        self.counts[new] = replace(self.counts.get(key, RowCounts()))
        self._learned |= {(new, *place[1:]): learned for place, learned in self._learned.items() if place[0] == key}
        self._unfilled |= {(new, *place[1:]) for place in self._unfilled if place[0] == key}
        if key in self._irregular:
            self._irregular.add(new)

    def _is_strange(self, place: Place, tensor: Tensor) -> bool:
        """Tell whether there are more rows than positions; the model may have padded to a length of its own."""
        leading = tensor.shape[:-1]
        if leading not in self._may_be_filled_up:
            self._may_be_filled_up[leading] = may_be_filled_up(self._positions, leading)
        return self._may_be_filled_up[leading] and place not in self._unfilled

    def look_at(self, key: str, number: int, tensors: Sequence[Tensor]) -> None:
        """Note one call, and learn from it if that is possible."""
        if self._shown is self._positions:
            self._plain.add(key, number, tensors)
        # A target with several calls is learned after all its calls were seen, and before any of their rows is taken.
        if self.is_probed and not number and (key, 1, 0) not in self._perturbed.of:
            self._learn({key})

    def _foretold(self, key: str, places: Sequence[Place], tensors: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Return which rows of a call count by the known layouts, or None if these do not decide it."""
        if key in self._irregular:
            return None
        masks: list[Tensor | None] = []
        for place, tensor in zip(places, tensors, strict=True):
            learned, leading = self._learned.get(place), tensor.shape[:-1]
            if isinstance(learned, NotOfPositions):
                if not learned.fits(leading.numel(), self._positions.n_samples):
                    return None
                masks.append(None)
                continue
            marks = [self._marked(layout, leading) for layout in learned or ()]
            found = [mark.counted for mark in marks if mark is not None]
            # Layouts that agreed until now differ here, so one of them must be chosen.
            if not found or len(found) < len(marks) or not all(torch.equal(mask, found[0]) for mask in found[1:]):
                return None
            masks.append(found[0])
        return masks

    def _marked(self, layout: Layout, leading: torch.Size) -> Marks | None:
        """Return what a layout says of this batch; the same masks for all inputs, so that they are read only once."""
        if (layout, leading) not in self._marks:
            self._marks[layout, leading] = layout.marks(self._positions, leading)
        return self._marks[layout, leading]

    def _learn(self, keys: set[str]) -> None:
        for place, plain in self._plain.of.items():
            if place[0] in keys and self.is_probed:
                found = self._compared(place, plain)
                if found is not None:
                    self._learned[place] = _agreed(self._learned.get(place), found)
                    if self._learned[place] == ():
                        self._irregular.add(place[0])

    def _compared(self, place: Place, plain: Tensor) -> Learned | None:
        """Return what the passes so far show of one activation; None if a batch of another length must decide."""
        perturbed, leading = self._perturbed.of.get(place), self._plain.leading[place]
        if perturbed is None or self._perturbed.leading[place] != leading:
            return ()
        changed = changed_rows(plain, perturbed).reshape(leading).cpu()
        longer = self._longer.leading.get(place)
        seen = Seen(leading, changed, None if longer is None else longer.numel())
        found = agreeing(seen, self._shown, self._more)
        return () if found is None and self.lengths_are_probed else found


def _n_dropped(masks: Sequence[Tensor | None]) -> int:
    return sum(int((~mask).sum()) for mask in masks if mask is not None)


def given_mask(given: Given, key: str, leading: torch.Size) -> Tensor | None:
    """Return which rows of an input count by the caller's mask, or None for all if the mask has another shape.

    Args:
        given: one mask for all inputs, or masks by name of a module that the input's target is, or is inside.
        key: the input.
        leading: leading shape of the activation; it may be flat.
    """
    mask: Tensor | None
    if isinstance(given, Tensor):
        mask = given
    else:
        inside = [name for name in given if key == name or key.startswith(name + ".") or not name]
        mask = given[max(inside, key=len)] if inside else None
    if mask is None or (leading != mask.shape and not (len(leading) == 1 < mask.ndim and mask.shape[1] > 1)):
        return None
    return mask.bool().reshape(leading) if mask.numel() == leading.numel() else None


def _agreed(before: Learned | None, now: Learned) -> Learned:
    """Return the layouts that agree with this batch and with those before."""
    if isinstance(before, tuple) and isinstance(now, tuple):
        return tuple(layout for layout in before if layout in now)
    return now if before is None or isinstance(now, type(before)) else ()
