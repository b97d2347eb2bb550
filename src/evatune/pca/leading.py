"""The leading eigenpairs of some rows, and little else: what processes exchange in place of a larger state.

Shapes: d features, k components, p eigenpairs.

It merges and takes rows as `evatune.pca.incremental` does, and is smaller when saved, (p + 1) d numbers: of the
moments it keeps the mean and the total variance. They stay in full precision, because one massive component rounded to
16 bits would look like new directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.pca.backend import Wanted
from evatune.pca.incremental import IncrementalState
from evatune.pca.moments import Moments

SPARE = 4
"""How many times k vectors are kept while states are merged, so that truncating after each merge loses little."""


class LeadingState(IncrementalState):
    """The leading eigenpairs, the mean and the total variance."""

    name = "leading"
    is_offered: ClassVar[bool] = False

    @property
    def n_kept(self) -> int:
        """How many vectors are kept."""
        return min(SPARE * self.n_components, self.n_features)

    @classmethod
    def of(cls, wanted: Wanted, moments: Moments, components_pd: Tensor, singular_values_p: Tensor) -> Self:
        """Return the state of rows with these moments and leading components; those without variance are left out."""
        seen_p = singular_values_p > 0
        return cls(wanted, moments, components_pd[seen_p], singular_values_p[seen_p])

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors."""
        moments = self.moments
        return {
            "components": self.components_pd,
            "singular_values": self.singular_values_p,
            "mean": moments.mean_d.to(moments.shift_d),
            "scatter": moments.variance_d(center=self.center).sum() * max(moments.n_rows - 1, 1),
            "n_samples_seen": torch.tensor(moments.n_rows),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], wanted: Wanted) -> Self:
        """Return the state that `tensors` describes."""
        mean_d, n_rows = tensors["mean"], int(tensors["n_samples_seen"])
        shift_d = mean_d if wanted.center else torch.zeros_like(mean_d)
        moments = Moments.around(shift_d)
        moments.n_rows = n_rows
        moments.sum_d += n_rows * (mean_d - shift_d)
        # Callers read only the sum of the variances of all features.
        moments.squares_d += tensors["scatter"] / len(mean_d)
        return cls(wanted, moments, tensors["components"], tensors["singular_values"])
