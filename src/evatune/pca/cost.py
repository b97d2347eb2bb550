"""What following the rows of one input takes in memory: bounds, of float32 sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FLOAT, DOUBLE = 4, 8
"""Bytes of a number in float32 and in float64."""

SCALARS_BYTES = 256
"""Room for the counters, flags and names of one state."""

CACHED_COMPONENTS = 5
"""How many sets of components are kept beside a state while it is watched: those of the last three checks, those before
the last batch, and the present ones."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What following one input takes."""

    backend: str
    """The backend in use."""
    width: int | None = None
    """Columns with which a sketch begins, beside its probes."""
    state_bytes: int
    """Bound of what is accumulated: the tensors of `state_dict`."""
    initial_bytes: int
    """What it begins with."""
    cached_bytes: int
    """Bound of what is kept beside the state from one check to the next."""


def moments_bytes(n_features: int) -> int:
    """Return the bytes of count, shift, sum and squares."""
    return FLOAT * n_features + 2 * DOUBLE * n_features + SCALARS_BYTES


def components_bytes(n_components: int, n_features: int) -> int:
    """Return the bytes of the components that are kept beside a state."""
    return CACHED_COMPONENTS * FLOAT * n_components * n_features


def total(costs: Iterable[Cost]) -> Cost:
    """Return what following several inputs takes together."""
    costs = list(costs)
    return Cost(
        backend="+".join(sorted({cost.backend for cost in costs})),
        width=max((cost.width for cost in costs if cost.width), default=None),
        state_bytes=sum(cost.state_bytes for cost in costs),
        initial_bytes=sum(cost.initial_bytes for cost in costs),
        cached_bytes=sum(cost.cached_bytes for cost in costs),
    )
