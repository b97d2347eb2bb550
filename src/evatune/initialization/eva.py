"""EVA: the down-projection starts from the directions in which the activations vary most (Algorithm 1 of the paper).

Shapes: k components kept, d input features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.errors import EvaError


def eva(components_kd: Tensor, rank: int, *, singular_values: Tensor | None = None, whiten: bool = False) -> Tensor:
    """Return the rows of `A`: the leading `rank` components, whitened if asked.

    With `B` = 0 the adapter starts as A = (v_1 ... v_r), or A = (v_1 / sqrt(s_1) ... v_r / sqrt(s_r)) when whitened.
    A direction without variance (s_j is zero to rounding) is not whitened: it keeps length one.

    Args:
        components_kd: principal components, shape (k, in_features), leading first, rows of length one.
        rank: rows to return, 0 <= rank <= k.
        singular_values: shape (k,); needed to whiten.
        whiten: divide each row by the square root of its singular value, as the authors' code does.

    Returns:
        `A` of shape (rank, in_features), on the device and in the dtype of the components. It has memory of its own,
        so targets that share an input can each train their own copy.

    Raises:
        EvaError: `rank` is out of range, or `whiten` without one singular value a component.

    Cost: O(rank * in_features).
    """
    k, d = components_kd.shape
    if not 0 <= rank <= k:
        raise EvaError(
            f"rank {rank} is out of range: {k} components of {d} features are known; "
            "take a rank between 0 and that, or measure more components (n_components)."
        )
    A_rd = components_kd[:rank].detach().clone(memory_format=torch.contiguous_format)
    if not whiten:
        return A_rd
    if singular_values is None or singular_values.shape != (k,):
        received = "none" if singular_values is None else f"shape {tuple(singular_values.shape)}"
        raise EvaError(f"whitening needs one singular value for each of the {k} components, got {received}.")
    s_k = singular_values.detach().to(A_rd)
    varies_k = s_k > s_k.max() * max(k, d) * torch.finfo(s_k.dtype).eps if k else s_k > 0
    return A_rd / torch.where(varies_k, s_k, torch.ones_like(s_k))[:rank].sqrt().unsqueeze(1)
