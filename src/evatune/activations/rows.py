"""Which rows of an activation count: not padding, and on request not what the loss ignores (Appendix F.3 of the paper).

Shapes: B sequences in a batch, T positions, d features, n rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.settings import IGNORED_LABEL

_INPUTS = ("input_ids", "inputs_embeds")


@dataclass(frozen=True, kw_only=True)
class RowMasks:
    """Boolean masks of one batch; each concerns activations that have one vector per position of its sequence."""

    encoder_bt: Tensor | None = None
    """Positions of the input sequence that count, (B, T)."""
    decoder_bt: Tensor | None = None
    """Positions of the target sequence of an encoder-decoder model that count, (B, T')."""

    @classmethod
    def of(cls, batch: Any, *, encoder_decoder: bool, use_label_mask: bool = False) -> RowMasks:
        """Read the masks from a batch.

        Args:
            batch: a mapping with `attention_mask` (B, T), `decoder_attention_mask` (B, T') and `labels`, any of which
                may be missing, or a tuple that starts with one; anything else has no masks.
            encoder_decoder: whether labels belong to a second, decoder sequence.
            use_label_mask: drop positions whose label is `IGNORED_LABEL`. Labels that are not per position, as in
                classification, mask nothing.

        Raises:
            EvaError: `use_label_mask` is set, but the batch has no labels.
        """
        if isinstance(batch, tuple | list) and batch:
            batch = batch[0]
        if not isinstance(batch, Mapping):
            batch = {}
        masks = {False: _matrix(batch.get("attention_mask")), True: _matrix(batch.get("decoder_attention_mask"))}
        labels = batch.get("labels")
        if use_label_mask and not isinstance(labels, Tensor):
            raise EvaError("use_label_mask=True needs batches with 'labels', and this batch has none.")
        reference = next((given for given in (masks[False], *map(batch.get, _INPUTS)) if given is not None), None)
        if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            per_position = encoder_decoder or (reference is not None and labels.shape == reference.shape[:2])
            # In an encoder-decoder model, padding of the decoder sequence shows in the labels only.
            if per_position and (use_label_mask or (encoder_decoder and masks[True] is None)):
                counted = labels != IGNORED_LABEL
                present = masks[encoder_decoder]
                masks[encoder_decoder] = counted if present is None else counted & present.to(counted.device)
        return cls(encoder_bt=masks[False], decoder_bt=masks[True])

    @property
    def hide_some(self) -> bool:
        """Whether any position does not count."""
        return any(mask is not None and not mask.all() for mask in (self.encoder_bt, self.decoder_bt))

    def fitting(self, leading: torch.Size, *, in_decoder: bool = False) -> Tensor | None:
        """Return the mask (B, T) of activations with this leading shape, or None if none fits or all positions count.

        Args:
            leading: shape of an activation without its last dimension: (B, T), or (B T,).
            in_decoder: the activation belongs to the decoder of an encoder-decoder model, so where both masks fit in
                shape, the decoder's is meant.
        """
        order = (self.decoder_bt, self.encoder_bt) if in_decoder else (self.encoder_bt, self.decoder_bt)
        mask_bt = next((mask for mask in order if mask is not None and _fits(mask, leading)), None)
        return None if mask_bt is None or mask_bt.all() else mask_bt

    def select(self, activation: Tensor, *, in_decoder: bool = False, also: Tensor | None = None) -> Tensor:
        """Return the rows of an activation that count.

        Args:
            activation: (..., d); its leading shape is compared with the masks.
            in_decoder: see `fitting`.
            also: a further mask, of exactly its leading shape.

        Returns:
            Rows, (n, d). All rows where no mask fits: pooled vectors, image patches, batches without a mask.
        """
        rows_nd = activation.reshape(-1, activation.shape[-1])
        mask_bt = self.fitting(activation.shape[:-1], in_decoder=in_decoder)
        if also is not None and also.shape == activation.shape[:-1]:
            mask_bt = also if mask_bt is None else also & mask_bt.to(also.device).view_as(also)
        if mask_bt is None:
            return rows_nd
        # Positions are found where the mask lives, which for a loader's batch is the CPU.
        kept_n = mask_bt.reshape(-1).nonzero().squeeze(1)
        return rows_nd.index_select(0, kept_n.to(rows_nd.device, non_blocking=True))


def _matrix(mask: Any) -> Tensor | None:
    """Return a (B, T) mask as booleans; masks of other shapes (packed or 4-d attention) say nothing about rows."""
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _fits(mask_bt: Tensor, leading: torch.Size) -> bool:
    return leading == mask_bt.shape or (leading == torch.Size([mask_bt.numel()]) and mask_bt.shape[1] > 1)
