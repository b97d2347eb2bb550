"""What every streaming PCA here tells of what it has learned, from its components and singular values.

Shapes: d features, k components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class LearnedPCA(ABC):
    """The attributes of scikit-learn's contract that follow from others."""

    @property
    @abstractmethod
    def singular_values_(self) -> Tensor:
        """Singular values of the centred rows, (k,)."""

    @property
    @abstractmethod
    def n_samples_seen_(self) -> int:
        """How many rows were seen."""

    @property
    @abstractmethod
    def total_variance_(self) -> float:
        """Sum of the variances of all features."""

    @property
    def explained_variance_(self) -> Tensor:
        """Variance along each component, (k,)."""
        return self.singular_values_.square() / max(self.n_samples_seen_ - 1, 1)

    @property
    def explained_variance_ratio_(self) -> Tensor:
        """Share of the total variance along each component, (k,); zeros where the rows never vary."""
        total = self.total_variance_
        return self.explained_variance_ / total if total > 0 else torch.zeros_like(self.singular_values_)
