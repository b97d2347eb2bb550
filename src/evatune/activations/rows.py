"""The rows of an activation that count.

Shapes: L leading shape of an activation, d features, n rows.
"""

from __future__ import annotations

from torch import Tensor

from evatune.pca.moving import moved


def select(activation: Tensor, *masks: Tensor | None) -> Tensor:
    """Return the rows of an activation that count.

    Args:
        activation: (L, d).
        masks: which rows count, boolean, of its leading shape; None means all.

    Returns:
        Rows, (n, d).
    """
    rows_nd = activation.reshape(-1, activation.shape[-1])
    given = [mask for mask in masks if mask is not None]
    if not given:
        return rows_nd
    counted = given[0]
    for mask in given[1:]:
        counted = counted & mask.to(counted.device)
    # Positions are found on the device of the mask, which for the batch of a loader is the CPU.
    kept_n = counted.reshape(-1).nonzero().squeeze(1)
    return rows_nd.index_select(0, moved(kept_n, rows_nd.device))
