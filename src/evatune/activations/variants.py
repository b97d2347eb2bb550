"""The same batch with other values at its padding, with longer or shorter sequences, or without padding.

The model's activations for these show which rows are padding (`evatune.activations.padding`).

Shapes: B samples, T positions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from evatune.activations.positions import DECODER, MASK, TORCH_MASK, BatchPositions, entries_of
from evatune.settings import IGNORED_LABEL


def with_entries(batch: Any, entries: Mapping[str, Any]) -> Any:
    """Return a batch like another one with these entries instead; a tuple keeps its other members."""
    if isinstance(batch, tuple | list):
        return type(batch)([with_entries(batch[0], entries), *batch[1:]])
    changed = copy.copy(batch)
    for name, value in entries.items():
        changed[name] = value
    return changed


def perturbed(batch: Any, positions: BatchPositions, *, reserved: frozenset[int] = frozenset(), seed: int = 0) -> Any:
    """Return the batch with other values at its padding: token numbers of other positions, or noise of their size.

    Args:
        batch: the batch.
        positions: what `read_positions` returned for it.
        reserved: token numbers with a special meaning for the model, such as those of pictures.
        seed: seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    entries: dict[str, Tensor] = {}
    for sequence in positions.sequences:
        for name in sequence.content:
            value = entries_of(batch)[name]
            entries[name] = _replaced(value, ~sequence.kept.to(value.device), reserved, generator)
    return with_entries(batch, entries)


def _replaced(value: Tensor, padding: Tensor, reserved: frozenset[int], generator: torch.Generator) -> Tensor:
    changed = value.clone()
    old, usual = value[padding], value[~padding] if not padding.all() else value[padding]
    if value.is_floating_point():
        noise = torch.randn(old.shape, generator=generator, dtype=torch.float32, device="cpu").to(old)
        spread, mean = (usual.std(), usual.mean()) if usual.numel() > 1 else (usual.new_ones(()), 0)
        changed[padding] = mean + (spread + (spread == 0)) * noise
        return changed
    pool = usual.unique()
    free = [number for number in pool.tolist() if number not in reserved]
    pool = torch.tensor(free or pool.tolist(), dtype=value.dtype, device="cpu")
    drawn = torch.randint(len(pool), old.shape, generator=generator, device="cpu")
    same = pool[drawn] == old.cpu()
    changed[padding] = pool[torch.where(same, (drawn + 1) % len(pool), drawn)].to(value.device)
    return changed


def ragged(batch: Any, positions: BatchPositions, *, takes: Callable[[str], bool]) -> tuple[Any, BatchPositions]:
    """Return the batch with some of its last positions declared as padding, and its positions then.

    Args:
        batch: the batch.
        positions: what `read_positions` returned for it.
        takes: returns whether the model takes an entry of this name. A mask that it takes and the batch lacks is added.
    """
    entries: dict[str, Tensor] = {}
    sequences = []
    for index, sequence in enumerate(positions.sequences):
        *others, length = sequence.kept.shape
        last = (
            torch.arange(math.prod(others), device="cpu")
            .remainder(2)
            .mul(length // 3)
            .add(1 + index)
            .reshape(*others, 1)
        )
        still = torch.arange(length, device="cpu") < (length - last).clamp(min=1)
        kept = sequence.kept & still.to(sequence.kept.device)
        for name in sequence.masks:
            mask = entries_of(batch)[name]
            hidden = ~kept if mask.ndim == kept.ndim else ~kept.reshape(len(kept), *[1] * (mask.ndim - 2), length)
            entries[name] = mask.expand(torch.broadcast_shapes(mask.shape, hidden.shape)).masked_fill(
                hidden.to(mask.device), _padding_value(name, mask)
            )
        added = (DECODER if any(name.startswith(DECODER) for name in sequence.entries) else "") + MASK
        if not sequence.masks and takes(added) and sequence.entries:
            entries[added] = kept.long()
        sequences.append(replace(sequence, kept=kept))
    return with_entries(batch, entries), replace(positions, sequences=tuple(sequences))


def lengthened(batch: Any, positions: BatchPositions) -> tuple[Any, list[int]]:
    """Return the batch with more padding at the end of each sequence, and how many positions each sequence gets.

    The numbers differ, so that rows of one sequence cannot be mistaken for those of another.
    """
    numbers = [max(1, sequence.kept.shape[-1] // 4) + index for index, sequence in enumerate(positions.sequences)]
    return _resized(batch, positions, lambda value, axis, index: _stretched(value, axis, numbers[index])), numbers


def shortened(batch: Any, positions: BatchPositions) -> tuple[Any, list[int]]:
    """Return the batch with half of each sequence, and by how many positions each is longer then (below zero)."""
    lengths = [sequence.kept.shape[-1] for sequence in positions.sequences]
    kept = [max(1, length // 2 - index) for index, length in enumerate(lengths)]
    cut = _resized(batch, positions, lambda value, axis, index: value.narrow(axis, 0, kept[index]))
    return cut, [new - length for new, length in zip(kept, lengths, strict=True)]


def _stretched(value: Tensor, axis: int, number: int) -> Tensor:
    return torch.cat([value, value.narrow(axis, value.shape[axis] - 1, 1).repeat_interleave(number, axis)], dim=axis)


def _resized(batch: Any, positions: BatchPositions, resize: Callable[[Tensor, int, int], Tensor]) -> Any:
    """Return the batch with all that belongs to a sequence made longer or shorter along its axis."""
    entries = {}
    for index, sequence in enumerate(positions.sequences):
        n_dims, length = sequence.kept.ndim, sequence.kept.shape[-1]
        for name in sequence.entries:
            entries[name] = resize(entries_of(batch)[name], n_dims - 1, index)
        if sequence.labels is not None:
            labels = resize(entries_of(batch)[sequence.labels], n_dims - 1, index)
            labels[..., length:] = IGNORED_LABEL
            entries[sequence.labels] = labels
        for name in sequence.masks:
            mask = entries_of(batch)[name]
            axes = [axis for axis in range(1, mask.ndim) if mask.shape[axis] == length]
            for axis in axes[-2:] if mask.ndim > n_dims else [n_dims - 1]:
                mask = resize(mask, axis, index)
                if mask.shape[axis] > length:
                    mask = mask.clone()
                    mask.narrow(axis, length, mask.shape[axis] - length).fill_(_padding_value(name, mask))
            entries[name] = mask
    return with_entries(batch, entries)


def _padding_value(name: str, mask: Tensor) -> float:
    """Return the value of a mask at padding: false, 0, or the most negative number of an additive mask."""
    if name.endswith(TORCH_MASK):
        return -math.inf if mask.is_floating_point() else 1
    if mask.is_floating_point() and bool((mask < 0).any()):
        return float(mask.min())
    return 0


def without_padding(batch: Any, positions: BatchPositions) -> Iterator[Any] | None:
    """Return the batch in parts without padding: samples of equal length together, and nothing else.

    Returns:
        The parts; None if the batch cannot be cut: there is padding inside a sequence, or entries of the batch are not
        divided by samples.
    """
    entries = entries_of(batch)
    n_samples = len(positions.sequences[0].kept) if positions.sequences else 0
    ranges: list[list[tuple[int, int]]] = []
    for sequence in positions.sequences:
        kept_bt = sequence.kept.flatten(1, -2).any(dim=1) if sequence.kept.ndim > 2 else sequence.kept
        found = _ranges(kept_bt)
        whole = all(bool(sequence.kept[b, ..., start:stop].all()) for b, (start, stop) in enumerate(found or []))
        if found is None or len(found) != n_samples or not whole:
            return None
        ranges.append(found)
    by_sample = (value for value in entries.values() if isinstance(value, Tensor) and value.ndim)
    if any(len(value) != n_samples for value in by_sample):
        return None
    groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for sample in range(n_samples):
        cut = tuple(of_sequence[sample] for of_sequence in ranges)
        if all(start < stop for start, stop in cut):
            groups.setdefault(cut, []).append(sample)
    return (_part(batch, positions, samples, cut) for cut, samples in groups.items())


def _ranges(kept_bt: Tensor) -> list[tuple[int, int]] | None:
    """Return where each sample begins and ends, or None if one has padding inside."""
    found = []
    for kept_t in kept_bt.tolist():
        if not any(kept_t):
            found.append((0, 0))
            continue
        start, n_kept = kept_t.index(True), sum(kept_t)
        if not all(kept_t[start : start + n_kept]):
            return None
        found.append((start, start + n_kept))
    return found


def _part(batch: Any, positions: BatchPositions, samples: list[int], cut: tuple[tuple[int, int], ...]) -> Any:
    def chosen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim:
            return value[torch.tensor(samples, device=value.device)]
        return (
            [value[sample] for sample in samples] if isinstance(value, list) and len(value) >= len(samples) else value
        )

    entries = {name: chosen(value) for name, value in entries_of(batch).items()}
    for sequence, (start, stop) in zip(positions.sequences, cut, strict=True):
        axis, length = sequence.kept.ndim - 1, sequence.kept.shape[-1]
        for name in (*sequence.entries, *sequence.masks, *filter(None, [sequence.labels])):
            value = entries[name]
            axes = [a for a in range(1, value.ndim) if value.shape[a] == length][-2:]
            for cut_axis in axes if name in sequence.masks and value.ndim > axis + 1 else [axis]:
                value = value.narrow(cut_axis, start, stop - start)
            entries[name] = value
    if isinstance(batch, tuple | list):
        others = [chosen(member) if isinstance(member, Tensor) else member for member in batch[1:]]
        return type(batch)([with_entries(batch[0], entries), *others])
    return with_entries(batch, entries)
