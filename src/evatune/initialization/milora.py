"""MiLoRA: the adapter takes over the minor components of the weight (Wang et al. 2024, arXiv:2406.09044).

Shapes: o output features, d input features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.errors import EvaError


def milora(weight_od: Tensor, rank: int, *, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return `A` and `B` whose scaled product is the part of the weight with the smallest singular values.

    With W = U S V^T and the last r singular triples U_r, S_r, V_r:  A = sqrt(S_r / s) V_r^T,  B = U_r sqrt(S_r / s),
    so that s B A = U_r S_r V_r^T, which the caller subtracts from the frozen weight. Training starts from W and
    changes the directions with the smallest singular values first.

    Args:
        weight_od: shape (out_features, in_features).
        rank: r, at most the smaller side.
        scaling: s, the scale of the adapter.

    Returns:
        `A` of shape (rank, in_features) and `B` of shape (out_features, rank), in the weight's dtype if that is float32
        or float64, else in float32.

    Raises:
        EvaError: `rank` is out of range.

    Cost: one singular value decomposition, O(out_features * in_features * min(out_features, in_features)).
    """
    if not 1 <= rank <= min(weight_od.shape):
        o, d = weight_od.shape
        raise EvaError(f"rank {rank} is out of range: a weight of {o} x {d} has {min(o, d)} singular values.")
    weight_od = weight_od.detach()
    wide = weight_od if weight_od.dtype in (torch.float32, torch.float64) else weight_od.float()
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    root_r = (S[-rank:] / scaling).sqrt()
    return (root_r.unsqueeze(1) * Vh[-rank:]).contiguous(), (U[:, -rank:] * root_r).contiguous()
