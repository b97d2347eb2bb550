"""`State`: what a backend of `StreamingPCA` answers. A backend is one file with one subclass, and a row in `backends`.

Shapes: n rows, d features, k components, p eigenpairs.

A state is what is accumulated of rows that arrive in batches: their moments, which every backend keeps in the same way,
and what it needs beside them to tell the leading eigenpairs of the scatter matrix C = Σ (x - m)(x - m)ᵀ (uncentred:
C = Σ x xᵀ).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.pca.cost import Cost
from evatune.pca.moments import Moments
from evatune.pca.parking import Parkable
from evatune.pca.subspace import eigenpairs_of_factor, solver_copy
from evatune.pca.together import Steps, alone

Pairs = tuple[Tensor, Tensor]
"""Orthonormal eigenvectors in columns (d, p) and their eigenvalues (p,), descending."""

WORKING_COPIES = 4
"""How many copies of a state a factorization needs as working memory, as counted in the code: the state without the
mean, the same in float64, and the matrix that it is multiplied with."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a state is asked for; see `StreamingPCA`."""

    n_components: int
    """k; a state with fewer than k features keeps one component for each feature."""
    center: bool = True
    """Whether the scatter is about the mean."""
    tolerance: float | None = None
    """Allowed error, as a share of the variance that the best k components capture; with None a state never adapts."""
    seed: int = 0
    """Seed of everything random."""


class State(ABC):
    """What a backend has accumulated.

    Args:
        wanted: what is asked for.
        moments: count, mean and variance of the rows so far. `moments.shift_d` is subtracted from rows before the state
            sees them.
    """

    name: ClassVar[str]
    """As users write it, and as saved states and spectra name it."""
    is_offered: ClassVar[bool] = True
    """Whether users may ask for it."""
    keeps_all: ClassVar[bool] = False
    """Whether it can return any number of components, even more than were asked for."""
    turns_into: ClassVar[tuple[str, ...]] = ()
    """The backends that may replace it during a run."""
    needs_full_precision: bool = True
    """Whether rounding to bfloat16 would hide too much of the next rows."""

    def __init__(self, wanted: Wanted, moments: Moments) -> None:
        self.wanted = wanted
        self.moments = moments

    @classmethod
    @abstractmethod
    def start(cls, wanted: Wanted, moments: Moments) -> Self:
        """Return the state of no rows, on the device and in the dtype of the moments' shift."""

    @abstractmethod
    def update(self, shifted_nd: Tensor, *, product_dtype: torch.dtype) -> None:
        """Add shifted rows, (n, d), by matrix products; any more expensive work is left for `settle`.

        Args:
            shifted_nd: the rows; `moments` include them already. They are in the dtype of the shift, or in that of the
                products if the state does not need full precision.
            product_dtype: dtype in which they may be multiplied.
        """

    @property
    @abstractmethod
    def is_due(self) -> bool:
        """Whether enough rows have been added since the last `settle` that it should be called again."""

    @abstractmethod
    def settle(self) -> Steps[State]:
        """Do the work that `update` left, and return the state to continue with: this one or its replacement."""

    @abstractmethod
    def refresh(self) -> Steps[None]:
        """Fold in the rows since the last refresh, so that the state is as small as it can be."""

    @abstractmethod
    def eigenpairs(self, n_pairs: int, *, rough: bool = False) -> Steps[Pairs]:
        """Return the leading eigenpairs of the scatter matrix, in any float dtype.

        Args:
            n_pairs: how many are wanted, k or more. Fewer are returned if the rows vary in fewer directions.
            rough: the pairs only need to be good enough for the stopping rules. A rough call may store something that
                makes the next call cheaper; other calls change nothing.
        """

    @abstractmethod
    def missed(self) -> Steps[float]:
        """Return the variance that the first k pairs miss, not divided by the number of rows; NaN if unknown."""

    @abstractmethod
    def merged(self, other: Self) -> Self:
        """Return the state of both sets of rows; neither operand changes."""

    @abstractmethod
    def exactly(self) -> State | None:
        """Return a state with an exact second moment made from this one; None if this one has lost too much."""

    @abstractmethod
    def condensed(self) -> State:
        """Return a smaller state that merges nearly as well, or this one if there is none."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the state, moments included, as tensors that may share its memory."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], wanted: Wanted) -> Self:
        """Return the state that `tensors` describes; it keeps these tensors without a copy.

        Raises:
            KeyError: one is missing.
        """

    @classmethod
    @abstractmethod
    def cost(cls, n_components: int, n_features: int) -> Cost:
        """Return the memory that a state for rows of `n_features` features takes."""

    # -- derived -----------------------------------------------------------------------------------------------------

    @property
    def n_features(self) -> int:
        """How wide the rows are, d."""
        return self.moments.shift_d.shape[0]

    @property
    def n_components(self) -> int:
        """How many components are kept, k, after clipping to the number of features."""
        return min(self.wanted.n_components, self.n_features)

    @property
    def center(self) -> bool:
        """Whether the scatter is about the mean."""
        return self.wanted.center

    def release(self) -> None:  # noqa: B027 - few backends have any
        """Forget what can be computed again; what is parked leaves the device."""

    def parkable(self) -> list[Parkable]:
        """Return the matrices that may wait in main memory while they are not used."""
        return []

    def scatter_along(self, directions_kd: Tensor) -> Tensor:
        """Return vᵀ C v for every row v of `directions_kd`, (k,), with C approximated by its eigenpairs."""
        vectors_dp, values_p = alone(self.eigenpairs(self.n_components))
        return (directions_kd.to(vectors_dp) @ vectors_dp).square() @ values_p

    @property
    def working_bytes(self) -> int:
        """About how many bytes of working memory a factorization needs."""
        return WORKING_COPIES * sum(tensor.nbytes for tensor in self.tensors().values())

    def copied(self, device: torch.device) -> Self:
        """Return a copy that shares no memory, on a device."""
        tensors = {name: tensor.to(device, copy=True) for name, tensor in self.tensors().items()}
        return self.from_tensors(tensors, self.wanted)


def merge_eigenpairs(first: State, second: State) -> Pairs:
    """Return the eigenpairs of the sum of two scatter matrices, each approximated by its eigenpairs.

    Returns:
        Eigenvectors (d, at most p + q + 1) and eigenvalues, descending; with centring, the difference of the means
        adds one direction. Cost O(d (p + q)²).
    """
    factors = []
    for state in (first, second):
        vectors_dp, values_p = alone(state.eigenpairs(state.n_components))
        factors.append(vectors_dp * values_p.sqrt())
    if first.center and first.moments.n_rows and second.moments.n_rows:
        weight, difference_d = between_means(first.moments, second.moments)
        factors.append(weight**0.5 * difference_d.to(factors[0])[:, None])
    return eigenpairs_of_factor(torch.cat(factors, dim=1))


def between_means(mine: Moments, theirs: Moments) -> tuple[float, Tensor]:
    """Return weight and direction (d,) of the rank-one term that different means add to the merged scatter matrix."""
    weight = mine.n_rows * theirs.n_rows / max(mine.n_rows + theirs.n_rows, 1)
    return weight, solver_copy(mine.mean_d) - solver_copy(theirs.mean_d)
