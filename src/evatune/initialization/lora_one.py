"""LoRA-One: the adapter starts as one step down the full gradient (Zhang, Liu and Chen 2025, arXiv:2502.01235).

Shapes: o output features, d input features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.errors import EvaError


def lora_one(gradient_od: Tensor, rank: int, *, scaling: float = 1.0, step: float = 1 / 128) -> tuple[Tensor, Tensor]:
    """Return `A` and `B` whose scaled product is the best rank-r approximation of a gradient step.

    With G = U S V^T the gradient of the loss by the weight:  s B A = -step * U_r S_r V_r^T / S_1,  B = -U_r D and
    A = D V_r^T with D = sqrt(step S_r / (s S_1)). The largest singular value of the change of the weight is `step`,
    whatever the size of the gradient. The base weight is not changed, so the model's outputs change by this step.

    Args:
        gradient_od: gradient of the loss by the weight, shape (out_features, in_features).
        rank: r, at most the smaller side.
        scaling: s, the scale of the adapter.
        step: spectral norm of the first change of the weight.

    Returns:
        `A` of shape (rank, in_features) and `B` of shape (out_features, rank); zero B and orthonormal A where the
        gradient is zero.

    Raises:
        EvaError: `rank` or `step` is out of range.

    Cost: one singular value decomposition, O(out_features * in_features * min(out_features, in_features)).
    """
    if not 1 <= rank <= min(gradient_od.shape):
        o, d = gradient_od.shape
        raise EvaError(f"rank {rank} is out of range: a gradient of {o} x {d} has {min(o, d)} singular values.")
    if not 0 < step < float("inf"):
        raise EvaError(f"step must be a positive number, got {step!r}.")
    gradient_od = gradient_od.detach()
    U, S, Vh = torch.linalg.svd(gradient_od, full_matrices=False)
    if S[0] == 0:
        return Vh[:rank].contiguous(), torch.zeros_like(U[:, :rank])
    root_r = (step / scaling * S[:rank] / S[0]).sqrt()
    return (root_r.unsqueeze(1) * Vh[:rank]).contiguous(), (-U[:, :rank] * root_r).contiguous()
