"""`AnyPCA`: the protocol that every streaming PCA implements, whatever kind of rows it takes.

Shapes: d features, k components.

Three classes implement it: `StreamingPCA` (rows of numbers), `OneHotPCA` (token numbers) and `StackedPCA` (several
inputs that share one rank). No caller asks an object which of them it is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.pca.cost import Cost
from evatune.pca.parking import Parkable
from evatune.pca.together import Task, Work, together


class NotFittedError(EvaError, AttributeError):
    """A learned attribute was read before any row was seen."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The components at one moment, precise enough to watch how they change. Only the components are on the device."""

    components: Tensor
    """Orthonormal rows by descending variance, (k, d)."""
    singular_values: Tensor
    """Singular values of the centred rows, (k,)."""
    total_variance: float
    """Sum of the variances of all features."""
    n_samples_seen: int
    """How many rows there were."""

    @property
    def explained_variance(self) -> Tensor:
        """Variance along each component, (k,)."""
        return variances(self.singular_values, n_rows=self.n_samples_seen)


class AnyPCA(Protocol):
    """A streaming PCA. Reading an attribute never changes what a later read gives."""

    kind: ClassVar[str]
    """Name of the class in `evatune.pca.kinds`."""
    center: bool
    """Whether the mean is subtracted."""

    # -- learning -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def partial_fit(self, rows: Any, y: None = None) -> Self:
        """Add rows, in the form that this kind of PCA takes."""

    @abstractmethod
    def add(self, rows: Any) -> Self:
        """Add rows as `partial_fit` does, but leave work that is more expensive than matrix products for `settle`."""

    @abstractmethod
    def works(self, task: Task) -> list[Work]:
        """Return the open work of a task, so that `evatune.pca.many` can run it together with the work of others.

        The list is empty as long as there are no rows.
        """

    def settle(self) -> Self:
        """Do the work that `add` has left."""
        together(self.works(Task.SETTLE))
        return self

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """Return the present components, as cheaply as possible; a second call before more rows are added is free."""

    def refresh(self) -> Self:
        """Fold the rows since the last refresh into the state, which is then as small as it can be."""
        together(self.works(Task.REFRESH))
        return self

    @abstractmethod
    def release(self) -> None:
        """Forget what can be computed again from the state, but not the components that were found last.

        What is parked leaves the device.
        """

    @abstractmethod
    def parkable(self) -> list[Parkable]:
        """Return the matrices of the state that may wait in main memory while they are not used."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Return a new object that has seen the rows of both."""

    @abstractmethod
    def scatter_along(self, directions_kd: Tensor) -> Tensor:
        """Return Σ (vᵀ(x - m))² over the rows seen, for every row v of `directions_kd`, (k,)."""

    # -- what was learned ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def is_fitted(self) -> bool:
        """Whether any row was seen."""

    @property
    @abstractmethod
    def components_(self) -> Tensor:
        """Orthonormal rows by descending variance, (k, d)."""

    @property
    @abstractmethod
    def singular_values_(self) -> Tensor:
        """Singular values of the centred rows, (k,)."""

    @property
    @abstractmethod
    def mean_(self) -> Tensor:
        """Mean of the rows, (d,)."""

    @property
    @abstractmethod
    def total_variance_(self) -> float:
        """Sum of the variances of all features."""

    @property
    @abstractmethod
    def captured_error_(self) -> float:
        """Estimate of what these components miss, as a share of what the best k would capture; NaN if unknown."""

    @property
    @abstractmethod
    def n_samples_seen_(self) -> int:
        """How many rows were seen."""

    @property
    @abstractmethod
    def n_features_in_(self) -> int:
        """How wide the rows are."""

    @property
    @abstractmethod
    def n_components_(self) -> int:
        """How many components are kept, at most as many as there are features."""

    @property
    @abstractmethod
    def backend_(self) -> str:
        """The backend in use."""

    @property
    def explained_variance_(self) -> Tensor:
        """Variance along each component, (k,)."""
        return variances(self.singular_values_, n_rows=self.n_samples_seen_)

    @property
    def explained_variance_ratio_(self) -> Tensor:
        """Share of the total variance along each component, (k,); zeros if all rows are equal."""
        total = self.total_variance_
        return self.explained_variance_ / total if total > 0 else torch.zeros_like(self.singular_values_)

    # -- exchange and saving ------------------------------------------------------------------------------------------

    @abstractmethod
    def condensed(self) -> AnyPCA:
        """Return what processes exchange at the end: an object that merges as this one does, smaller where possible.

        The state is refreshed first.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of everything learned as a flat mapping of tensors, ready for safetensors."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Return the object that a `state_dict` of this class describes."""

    @abstractmethod
    def cost(self, *, n_features: int) -> Cost:
        """Return the memory that measuring rows of `n_features` features takes."""


def variances(singular_values_k: Tensor, *, n_rows: int) -> Tensor:
    """Return the variance along each component, (k,), from the singular values of `n_rows` rows, (k,)."""
    return singular_values_k.square() / max(n_rows - 1, 1)


def name_tensor(name: str) -> Tensor:
    """Return a name as a tensor of its bytes, for a `state_dict`; `read_name` reads it."""
    return torch.tensor(list(name.encode()), dtype=torch.uint8)


def read_name(tensor: Tensor) -> str:
    """Return the name that a tensor of `name_tensor` holds."""
    return bytes(tensor.tolist()).decode()
