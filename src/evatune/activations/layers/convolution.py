"""Convolutions: rows are the unfolded patches, one at every position of the output.

Shapes: B samples, C channels, G groups, K = ∏ kernel size, o output positions along a dimension; one to three
dimensions. Rows are (n, C/G * K), in the order in which the weight (out, C/G, *kernel) is flattened; a grouped
convolution has G rows a position.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evatune.activations.layer_type import LayerType, Rows, described
from evatune.errors import EvaError
from evatune.pca.moving import moved

MAX_ELEMENTS = 1 << 24
"""Patches are unfolded in pieces of at most about this many numbers (64 MiB in float32)."""


class ConvolutionType(LayerType):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, with stride, padding, dilation, groups and padding mode."""

    def features(self, module: Any) -> tuple[int, int] | None:
        """Return (in_channels / groups * kernel size, out_channels)."""
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return None
        return module.in_channels // module.groups * prod(module.kernel_size), module.out_channels

    def form(self, module: Any) -> Hashable:
        """Return the geometry of the patches."""
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        return "patches", *(getattr(module, name) for name in names)

    def activations(self, module: Any, entering: Any) -> tuple[Tensor, ...]:
        """Return the input with its channels last, (B, size..., C)."""
        n_dims = len(module.kernel_size)
        if isinstance(entering, Tensor) and entering.ndim == n_dims + 1:
            entering = entering.unsqueeze(0)
        if not isinstance(entering, Tensor) or entering.ndim != n_dims + 2 or entering.shape[1] != module.in_channels:
            raise EvaError(f"takes {module.in_channels} channels, but its input is {described(entering)}.")
        return (entering.movedim(1, -1),)

    def rows(self, module: Any, entering: Any, masks: Sequence[Tensor | None] = (None,)) -> Iterator[Rows]:
        """Yield patches, which count if any of their positions does."""
        (activation,) = self.activations(module, entering)
        entering, counted_bo = activation.movedim(-1, 1), None
        if masks[0] is not None:
            # Counted on the device of the mask, which for the batch of a loader is the CPU.
            patches = _unfold(F.pad(masks[0].unsqueeze(1).to(torch.uint8), _padding(module)), module)
            counted_bo = patches.flatten(len(module.kernel_size) + 1).bool().any(dim=-1)
        padded = F.pad(entering, _padding(module), mode=_PAD_MODES[module.padding_mode])
        patches = _unfold(padded, module)  # a view, (B, o..., C, kernel...)
        width = module.in_channels // module.groups * prod(module.kernel_size)
        step = max(1, MAX_ELEMENTS // max(prod(patches.shape[1:]), 1))
        for start in range(0, patches.shape[0], step):
            samples = patches[start : start + step]
            # One sample may be too large by itself (videos): then it is cut along its first dimension.
            step_o = patches.shape[1] if step > 1 else max(1, MAX_ELEMENTS // max(prod(patches.shape[2:]), 1))
            for start_o in range(0, patches.shape[1], step_o):
                piece = samples[:, start_o : start_o + step_o]
                if counted_bo is not None:
                    counted = counted_bo[start : start + step, start_o : start_o + step_o].nonzero(as_tuple=True)
                    piece = piece[tuple(moved(places, piece.device) for places in counted)]
                yield piece.reshape(-1, width)


_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def _padding(module: Any) -> list[int]:
    """Return what `F.pad` takes: before and after, last dimension first."""
    if module.padding == "valid":
        return [0, 0] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [n for total in reversed(totals) for n in (total // 2, total - total // 2)]
    return [n for n in reversed(module.padding) for _ in range(2)]


def _unfold(padded: Tensor, module: Any) -> Tensor:
    """Return the patches (B, o..., C, kernel...) of a padded input (B, C, size...) as a view.

    A later `reshape(-1, C/G * K)` gives each group its own rows, because the channels of a group are consecutive.
    """
    n_dims = len(module.kernel_size)
    patches = padded
    for dim, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        patches = patches.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return patches.movedim(1, n_dims + 1)
