"""What following the rows of one input takes: bounds of memory, estimates of work."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

FLOAT, DOUBLE = 4, 8
"""Bytes of a number in float32 and in float64."""

SCALARS_BYTES = 256
"""Room for the counters and flags of one state."""

CACHED_COMPONENTS = 5
"""How many sets of components are kept beside a state while it is watched: those of the last three checks, those before
the last batch, and the present ones."""

FULL_EIGH = 9.0
"""Operations of a symmetric eigendecomposition with eigenvectors, in units of n³: tridiagonal reduction, QR iteration
and back-transformation (Golub and Van Loan, Matrix Computations, section 8.3)."""

CORE_EIGH = 20.0
"""The same for the small matrices of a refresh or of a round of iteration, in units of l³. An estimate: they are too
small to run at the speed of large ones."""

THIN_PRODUCTS = 1 / 4
"""Share of the operations of thin products that counts as factorization. An estimate: they run about four times as fast
as the eigendecomposition of 256 × 256 that the speed of factorizations is measured on."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What following one input takes. Memory is that of float32 sums."""

    backend: str
    """The backend in use."""
    width: int | None = None
    """Columns with which a sketch begins, beside its probes."""
    state_bytes: float
    """Bound of what is accumulated: the tensors of `state_dict`."""
    initial_bytes: float
    """What it begins with."""
    cached_bytes: float
    """Bound of what is kept beside the state from one check to the next."""
    product_flops: float = 0.0
    """Operations of one batch."""
    factorization_flops: float = 0.0
    """Operations of all refreshes and checks together."""


def moments_bytes(n_features: int) -> int:
    """Return the bytes of count, shift, sum and squares."""
    return FLOAT * n_features + 2 * DOUBLE * n_features + SCALARS_BYTES


def components_bytes(n_components: int, n_features: int) -> int:
    """Return the bytes of the components that are kept beside a state."""
    return CACHED_COMPONENTS * FLOAT * n_components * n_features


def n_refreshes(n_batches: int) -> int:
    """Return how often the rows double in so many batches, the first batch counted."""
    return math.ceil(math.log2(max(n_batches, 1))) + 1


def n_checks(n_batches: int) -> int:
    """Return how often components are looked at: twice a doubling, first before and after a batch, and at the end."""
    return 2 * n_refreshes(n_batches) + 4


def total(costs: Iterable[Cost]) -> Cost:
    """Return what following several inputs takes together."""
    costs = list(costs)
    return Cost(
        backend="+".join(sorted({cost.backend for cost in costs})),
        width=max((cost.width for cost in costs if cost.width), default=None),
        state_bytes=sum(cost.state_bytes for cost in costs),
        initial_bytes=sum(cost.initial_bytes for cost in costs),
        cached_bytes=sum(cost.cached_bytes for cost in costs),
        product_flops=sum(cost.product_flops for cost in costs),
        factorization_flops=sum(cost.factorization_flops for cost in costs),
    )
