"""EVA-minor: the down-projection starts from the directions in which the activations vary least (Table 14).

Shapes: k components kept, d input features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.errors import EvaError


def eva_minor(components_kd: Tensor, rank: int) -> Tensor:
    """Return the rows of `A`: the last `rank` of all d components, the least variance first.

    Args:
        components_kd: all principal components, shape (d, in_features), leading first.
        rank: rows to return, 0 <= rank <= d.

    Returns:
        `A` of shape (rank, in_features); it owns its memory.

    Raises:
        EvaError: not all components are there, so the last one is not the least; or `rank` is out of range.

    Cost: O(rank * in_features); the components cost far more, see `docs/methods/ablations.md`.
    """
    k, d = components_kd.shape
    if k < d:
        raise EvaError(
            f"EVA-minor needs all {d} components of {d} features, got the first {k}; "
            f"measure with n_components={d} and backend='exact', on more than {d} rows."
        )
    if not 0 <= rank <= d:
        raise EvaError(f"rank {rank} is out of range: there are {d} components.")
    return components_kd[d - rank :].flip(0).detach().clone(memory_format=torch.contiguous_format)
