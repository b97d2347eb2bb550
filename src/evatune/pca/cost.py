"""Upper bounds of the memory that the PCA of one input takes, with sums in float32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

HALF, FLOAT, DOUBLE = 2, 4, 8
"""Bytes of a number in bfloat16, float32 and float64."""

SCALARS_BYTES = 256
"""Room for the counters, flags and names of one state."""

CACHED_COMPONENTS = 3 * HALF + 2 * FLOAT
"""Bytes that are kept beside a state for each number of its components while it is watched: those of the last three
checks, those before the last batch, and the present ones."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The memory that the PCA of one input takes."""

    backend: str
    """The backend in use."""
    width: int | None = None
    """With how many columns a sketch begins, probes not counted."""
    state_bytes: int
    """Upper bound of the bytes of the state: the tensors of `state_dict`."""
    initial_bytes: int
    """Bytes of the state at the beginning."""
    cached_bytes: int
    """Upper bound of the bytes that are kept beside the state from one check to the next."""


def moments_bytes(n_features: int) -> int:
    """Return the bytes of count, shift, sum and squares."""
    return FLOAT * n_features + 2 * DOUBLE * n_features + SCALARS_BYTES


def components_bytes(n_components: int, n_features: int) -> int:
    """Return the bytes of the components that are kept beside a state."""
    return CACHED_COMPONENTS * n_components * n_features


def total(costs: Iterable[Cost]) -> Cost:
    """Return the memory that several inputs take together."""
    costs = list(costs)
    return Cost(
        backend="+".join(sorted({cost.backend for cost in costs})),
        width=max((cost.width for cost in costs if cost.width), default=None),
        state_bytes=sum(cost.state_bytes for cost in costs),
        initial_bytes=sum(cost.initial_bytes for cost in costs),
        cached_bytes=sum(cost.cached_bytes for cost in costs),
    )
