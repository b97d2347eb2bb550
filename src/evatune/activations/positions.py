"""The sequences of a batch, and which of their positions count: all but padding, or only those that enter the loss.

Shapes: B samples, T positions. A sequence with further dimensions, as the choices of multiple choice, is (B, C, T).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.settings import IGNORED_LABEL

MASK, TORCH_MASK, LABELS = "attention_mask", "key_padding_mask", "labels"
"""Endings of the names of entries of a batch: attention masks, padding masks, and labels."""
UNREAD = ("padding_mask", "pixel_mask", "pixel_attention_mask")
"""Names of masks that models understand in different ways, or that are of pictures: they are read only if they fit
another entry of the batch position by position."""
INPUTS = ("input_ids", "inputs_embeds")
DECODER = "decoder_"


@dataclass(frozen=True, kw_only=True, eq=False)
class Positions:
    """The positions of one sequence of a batch."""

    kept: Tensor
    """Which positions are not padding, boolean, (B, T) or (B, C, T)."""
    learned: Tensor
    """Which positions enter the loss, of the same shape; all of them if `use_label_mask` is not set."""
    entries: tuple[str, ...]
    """The entries of the batch that hold a value for each position, without masks and labels."""
    masks: tuple[str, ...] = ()
    """The entries that say which positions are padding."""
    labels: str | None = None
    """The entry with a label for each position."""

    @cached_property
    def counted(self) -> Tensor:
        """Which positions count."""
        return self.kept & self.learned

    @property
    def content(self) -> tuple[str, ...]:
        """The entries that the model computes from: token numbers and embeddings; if there are none, all entries."""
        return tuple(name for name in self.entries if name.endswith(INPUTS)) or self.entries


Given = Tensor | Mapping[str, Tensor | None]
"""A mask of the positions that count, for all activations of its shape, or one for each of some modules by name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPositions:
    """The positions of all sequences of a batch."""

    sequences: tuple[Positions, ...] = ()
    unread: tuple[str, ...] = ()
    """Entries that may mark padding too, and that evatune does not understand."""
    given: Given | None = None
    """Which rows count, if the caller says so; then nothing else decides it."""

    @cached_property
    def has_padding(self) -> bool:
        """Whether any position is padding."""
        return any(not bool(sequence.kept.all()) for sequence in self.sequences)

    @cached_property
    def all_count(self) -> bool:
        """Whether every position counts."""
        return all(bool(sequence.counted.all()) for sequence in self.sequences)

    @cached_property
    def can_be_perturbed(self) -> bool:
        """Whether every sequence with padding has values there."""
        return all(sequence.entries or sequence.labels or bool(sequence.kept.all()) for sequence in self.sequences)

    @property
    def n_samples(self) -> int:
        """How many sequences of each kind there are, B or B C."""
        return max((sequence.kept.shape[:-1].numel() for sequence in self.sequences), default=0)


def entries_of(batch: Any) -> Mapping[str, Any]:
    """Return the named entries of a batch: a mapping, or a tuple or list that starts with one; otherwise none."""
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    return batch if isinstance(batch, Mapping) else {}


def read_positions(
    batch: Any, *, encoder_decoder: bool = False, use_label_mask: bool = False, loss_type: str | None = None
) -> BatchPositions:
    """Read which positions of a batch count.

    A sequence has a mask: `attention_mask`, `decoder_attention_mask` or any other prefix of `attention_mask`;
    or `key_padding_mask` with any prefix, which is true at padding, as in PyTorch. A mask of pairs of positions (3 or
    4 dimensions) keeps the positions that some position attends to. The values of a position are in all entries with
    the mask's prefix and its leading dimensions.

    Args:
        batch: a mapping, or a tuple or list that starts with one; anything else has no positions.
        encoder_decoder: whether labels belong to the decoder's sequence, whose padding they show.
        use_label_mask: count only positions that enter the loss. These are the positions with a label, or, if each
            position learns the next token, the positions before one.
        loss_type: what the model calls its loss. If this name does not say which position learns a label, labels that
            repeat the inputs are taken to be learned at the position before.

    Raises:
        EvaError: `use_label_mask` is set, but the batch has no labels.
    """
    entries = _marks_on_host(entries_of(batch))
    given = entries.get(LABELS)
    if use_label_mask and not isinstance(given, Tensor):
        raise EvaError("use_label_mask=True needs batches with 'labels', and this batch has none.")
    is_per_position = isinstance(given, Tensor) and given.ndim >= 2 and not given.is_floating_point()
    labels: Tensor | None = given if is_per_position else None
    kept = _kept(entries)
    owner = DECODER if encoder_decoder else ""
    if labels is not None and encoder_decoder:
        shown, masks = kept.get(DECODER, (None, ()))
        if shown is None or (not masks and shown.shape == labels.shape):  # labels alone show the decoder's padding
            kept[DECODER] = (labels != IGNORED_LABEL, ())
    sequences = []
    for prefix, (kept_bt, masks) in kept.items():
        of_sequence = labels if labels is not None and prefix == owner and labels.shape == kept_bt.shape else None
        learned_bt = torch.ones_like(kept_bt)
        if of_sequence is not None and use_label_mask:
            learned_bt = (of_sequence != IGNORED_LABEL).to(kept_bt.device)
            inputs = entries.get("input_ids")
            if not encoder_decoder and _is_learned_before(of_sequence, inputs, loss_type):
                learned_bt = torch.cat([learned_bt[..., 1:], torch.zeros_like(learned_bt[..., :1])], dim=-1)
        owned = tuple(_owned(entries, prefix, kept_bt.shape, others=set(kept) - {prefix}))
        if owned or of_sequence is not None or not prefix:  # a mask that fits no entry of the batch decides no rows
            sequences.append(
                Positions(
                    kept=kept_bt,
                    learned=learned_bt,
                    entries=owned,
                    masks=masks,
                    labels=None if of_sequence is None else LABELS,
                )
            )
    read = {name for sequence in sequences for name in sequence.masks}
    return BatchPositions(
        sequences=tuple(sequences), unread=tuple(name for name in _unread(entries) if name not in read)
    )


def _marks_on_host(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the entries; masks and labels are on the CPU, so that reading them stalls no device."""
    endings = (MASK, TORCH_MASK, LABELS, *UNREAD)
    return {
        name: value.cpu() if isinstance(value, Tensor) and name.endswith(endings) else value
        for name, value in entries.items()
    }


def _kept(entries: Mapping[str, Any]) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Return by prefix which positions are kept and by which masks; without a mask, the inputs keep all of theirs."""
    kept = dict(_masks(entries))
    for name in (*INPUTS, *(DECODER + name for name in INPUTS)):
        if isinstance(value := entries.get(name), Tensor) and value.ndim >= 2:
            prefix = DECODER if name.startswith(DECODER) else ""
            dims = value.shape[: value.ndim - name.endswith("embeds")]
            kept.setdefault(prefix, (torch.ones(dims, dtype=torch.bool, device="cpu"), ()))
    return kept


def _masks(entries: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Tensor, tuple[str, ...]]]]:
    """Yield for each mask the prefix of its name, which positions it keeps, and its name."""
    inputs = next((value for name in INPUTS if isinstance(value := entries.get(name), Tensor)), None)
    for name, value in entries.items():
        ending = next((ending for ending in (TORCH_MASK, MASK) if name.endswith(ending)), None)
        if ending is None or not isinstance(value, Tensor) or value.ndim < 2:
            continue
        prefix = name.removesuffix(ending)
        is_of_positions = value.ndim == 2 or (inputs is not None and value.shape == inputs.shape[: value.ndim])
        if is_of_positions and ending == MASK:
            yield prefix, (value.bool(), (name,))
        elif is_of_positions:
            yield prefix, ((value == 0) if value.is_floating_point() else ~value.bool(), (name,))
        elif value.ndim in (3, 4) and value.shape[-1] == value.shape[-2]:
            kept_bt = _attended_to(value)
            n_samples = len(inputs) if inputs is not None and not prefix else len(kept_bt)
            yield prefix, (kept_bt.expand(n_samples, -1) if len(kept_bt) == 1 else kept_bt, (name,))


def _attended_to(mask: Tensor) -> Tensor:
    """Return which positions any other position attends to, (B, T), by a mask of pairs, (B, T, T) or (B, heads, T, T).

    A position that no other position attends to is kept if it attends to itself and to others: in a causal model, the
    last one.
    """
    pairs = mask == 0 if mask.is_floating_point() and bool((mask < 0).any()) else mask.bool()
    pairs_btt = pairs.any(dim=1) if mask.ndim == 4 else pairs
    itself = torch.eye(pairs_btt.shape[-1], dtype=torch.bool, device=mask.device)
    others_btt = pairs_btt & ~itself
    return others_btt.any(dim=-2) | ((pairs_btt & itself).any(dim=-2) & others_btt.any(dim=-1))


def _owned(entries: Mapping[str, Any], prefix: str, dims: torch.Size, *, others: set[str]) -> Iterator[str]:
    """Yield the entries with a value at each position of the sequence with this prefix."""
    rivals = tuple(other for other in {*others, DECODER} - {prefix} if other)
    has_inputs = any(f"{prefix}{name}" in entries for name in INPUTS)
    for name, value in entries.items():
        is_other = name.endswith(("mask", LABELS)) or f"{name}_".startswith(rivals)
        if isinstance(value, Tensor) and not is_other and f"{name}_".startswith(prefix):
            # Beside token numbers, float vectors with as many positions belong to something else, such as a picture.
            is_of_something_else = has_inputs and not name.endswith(INPUTS) and value.is_floating_point()
            if value.shape[: len(dims)] == dims and not (is_of_something_else and value.ndim > len(dims)):
                yield name


def _unread(entries: Mapping[str, Any]) -> Iterator[str]:
    for name, value in entries.items():
        may_be = isinstance(value, Tensor) and name.endswith(UNREAD) and not name.endswith(TORCH_MASK)
        if may_be and bool((value == 0).any()) and bool((value != 0).any()):
            yield name


def _is_learned_before(labels: Tensor, inputs: Any, loss_type: str | None) -> bool:
    """Tell whether a label is learned at the position before it, as the next token."""
    if loss_type is not None:
        return loss_type.endswith(("ForCausalLM", "ForConditionalGeneration"))
    if not isinstance(inputs, Tensor) or inputs.shape != labels.shape:
        return False
    counted = labels != IGNORED_LABEL
    return bool((labels == inputs.to(labels.device))[counted].all())
