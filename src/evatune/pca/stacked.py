"""Several inputs whose adapters must share one rank, followed by one streaming PCA each and reported as one.

Shapes: P parts, n rows, d features of a part, D = Σ d features in all, k components.

A layer that adapts several inputs with one rank (the packed projections and the output projection of an attention
module, all experts of a fused layer) is block-diagonal: a map from the stacked inputs, D wide, in which component j has
a piece in every part. Piece j of a part is the part's own j-th principal component, and the variance of component j is
Σ over parts, weighted by their rows. Pieces are scaled by 1/√P, so that the stacked components are orthonormal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.pca.learned import LearnedPCA
from evatune.pca.streaming import NotFittedError, StreamingPCA
from evatune.pca.subspace import complete_basis


class StackedPCA(LearnedPCA):
    """One `StreamingPCA` for each of several parts, seen as the PCA of the stacked input.

    Args:
        n_components: k; where a part is narrower, its pieces of the later components are zero.
        widths: features of each part.
        new_pca: makes the PCA of a part with so many components.
        alike: the parts are samples of one space (all experts get rows of the same hidden states). A part with fewer
            rows than components then takes its pieces from all parts merged; otherwise it completes its own directions
            at random. Either way it counts with the variance of its own rows.
        center: whether the parts' means are subtracted.

    Attributes: as those of `StreamingPCA`. `n_samples_seen_` counts the rows of all parts, and variances are means over
        the parts, weighted by rows.

    Cost: that of its parts.
    """

    def __init__(
        self,
        n_components: int,
        *,
        widths: Sequence[int],
        new_pca: Callable[[int], StreamingPCA],
        alike: bool = False,
    ) -> None:
        self.widths = tuple(widths)
        self.n_components = min(n_components, sum(widths))
        self.alike = alike
        self.parts = [new_pca(min(self.n_components, width)) for width in widths]
        self.center = self.parts[0].center

    def partial_fit(self, rows: Sequence[Tensor], y: None = None) -> StackedPCA:
        """Add rows: one matrix (n, d) for each part, of which any may be empty.

        Raises:
            EvaError: the rows of a part are not fit for `StreamingPCA.partial_fit`.
        """
        for part, rows_nd in zip(self.parts, rows, strict=True):
            part.partial_fit(rows_nd)
        return self

    def refresh(self) -> StackedPCA:
        """Refresh the parts."""
        for part in self._fitted():
            part.refresh()
        return self

    def merge(self, other: StackedPCA) -> StackedPCA:
        """Return a new object that has seen the rows of both.

        Raises:
            EvaError: the two do not agree in their settings.
        """
        if (self.widths, self.alike) != (other.widths, other.alike):
            raise EvaError(f"only equal stacks merge, but one has parts of {self.widths}, the other of {other.widths}.")
        return self._of([mine.merge(theirs) for mine, theirs in zip(self.parts, other.parts, strict=True)])

    def scatter_along(self, directions_kd: Tensor) -> Tensor:
        """Return Σ (vᵀ(x - m))² over the rows of all parts, for every stacked direction v of (k, D), (k,)."""
        energies_k = directions_kd.new_zeros(len(directions_kd))
        pieces = (directions_kd * len(self.parts) ** 0.5).split(self.widths, dim=1)
        for part, piece_kd in zip(self.parts, pieces, strict=True):
            if part.is_fitted:
                energies_k += part.scatter_along(piece_kd).to(energies_k)
        return energies_k

    # -- what was learned ---------------------------------------------------------------------------------------------

    @property
    def is_fitted(self) -> bool:
        """Whether any part has seen any row."""
        return any(part.is_fitted for part in self.parts)

    @property
    def n_components_(self) -> int:
        """How many components are kept."""
        return self.n_components

    @property
    def n_features_in_(self) -> int:
        """Width of the stacked input."""
        return sum(self.widths)

    @property
    def n_samples_seen_(self) -> int:
        """How many rows all parts have seen."""
        return sum(part.n_samples_seen_ for part in self._fitted())

    @property
    def rows_of_parts(self) -> list[int]:
        """How many rows each part has seen."""
        return [part.n_samples_seen_ if part.is_fitted else 0 for part in self.parts]

    @property
    def backend_(self) -> str:
        """The backend of the parts."""
        return self._fitted()[0].backend_

    @property
    def mean_(self) -> Tensor:
        """Means of the parts, one after the other, (D,); zeros for a part without rows."""
        like = self._fitted()[0].mean_
        means = [
            part.mean_ if part.is_fitted else like.new_zeros(width)
            for part, width in zip(self.parts, self.widths, strict=True)
        ]
        return torch.cat(means)

    @property
    def total_variance_(self) -> float:
        """Sum of the variances of all features, a mean over the parts weighted by their rows."""
        scatter = sum(part.total_variance_ * max(part.n_samples_seen_ - 1, 1) for part in self._fitted())
        return scatter / max(self.n_samples_seen_ - 1, 1)

    @property
    def captured_error_(self) -> float:
        """The largest of the parts' estimates; see `StreamingPCA`."""
        return max(part.captured_error_ for part in self._fitted())

    @property
    def singular_values_(self) -> Tensor:
        """Root of the summed squares of the parts' singular values, (k,)."""
        squares_k = self._fitted()[0].singular_values_.new_zeros(self.n_components)
        for part in self._fitted():
            squares = part.singular_values_.square()
            squares_k[: len(squares)] += squares
        return squares_k.sqrt()

    @property
    def components_(self) -> Tensor:
        """Stacked components by descending variance, (k, D)."""
        like = self._fitted()[0].components_
        pooled_kd: Tensor | None = None
        pieces = []
        for number, (part, width) in enumerate(zip(self.parts, self.widths, strict=True)):
            n_kept = min(self.n_components, width)
            if part.is_fitted and (part.n_samples_seen_ >= n_kept or len(self.parts) == 1):
                piece_kd = part.components_
            elif self.alike:
                if pooled_kd is None:
                    pooled_kd = self._pooled().components_
                piece_kd = pooled_kd
            elif part.is_fitted:
                piece_kd = part.components_  # completed at random
            else:
                piece_kd = complete_basis(like.new_zeros(width, 0), n_kept, seed=number).T
            pieces.append(torch.nn.functional.pad(piece_kd, (0, 0, 0, self.n_components - n_kept)))
        return torch.cat(pieces, dim=1) / len(self.parts) ** 0.5

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything learned as a flat mapping of tensors; parts without rows have no entry."""
        state = {
            f"part.{number}.{name}": tensor
            for number, part in enumerate(self.parts)
            if part.is_fitted
            for name, tensor in part.state_dict().items()
        }
        return state | {
            "widths": torch.tensor(self.widths),
            "alike": torch.tensor(self.alike),
            "center": torch.tensor(self.center),
            "n_components": torch.tensor(self.n_components),
            "n_samples_seen": torch.tensor(self.n_samples_seen_),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> StackedPCA:
        """Return the object that `state_dict` describes."""
        center = bool(state["center"])
        stacked = cls(
            int(state["n_components"]),
            widths=state["widths"].tolist(),
            new_pca=lambda n: StreamingPCA(n, center=center),
            alike=bool(state["alike"]),
        )
        for number, part in enumerate(stacked.parts):
            prefix = f"part.{number}."
            own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            if own:
                part.load_state_dict(own)
        return stacked

    # -- inside -------------------------------------------------------------------------------------------------------

    def _of(self, parts: list[StreamingPCA]) -> StackedPCA:
        result = StackedPCA.__new__(StackedPCA)
        result.widths, result.n_components, result.alike = self.widths, self.n_components, self.alike
        result.parts, result.center = parts, self.center
        return result

    def _fitted(self) -> list[StreamingPCA]:
        fitted = [part for part in self.parts if part.is_fitted]
        if not fitted:
            raise NotFittedError("this StackedPCA has seen no rows yet; call partial_fit first.")
        return fitted

    def _pooled(self) -> StreamingPCA:
        """Return the PCA of all rows of all parts, which are of one width."""
        pooled, *others = self._fitted()
        for part in others:
            pooled = pooled.merge(part)
        return pooled
