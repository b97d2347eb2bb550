"""Several inputs whose adapters must share one rank: each has a streaming PCA of its own, and all are reported as one.

Shapes: P parts, n rows, d features of a part, D = Σ d features in all, k components.

A layer that adapts several inputs with one rank (the packed projections and the output projection of an attention
module, all experts of a fused layer) is a block-diagonal map of the stacked inputs, D wide. Component j has a
piece in every part. Piece j of a part is the part's own j-th principal component, and the variance of component j is
Σ over parts, weighted by their rows. Pieces are scaled by 1/√P, so that the stacked components are orthonormal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.pca.contract import AnyPCA, NotFittedError, Snapshot, name_tensor
from evatune.pca.cost import DOUBLE, SCALARS_BYTES, Cost, total
from evatune.pca.parking import Parkable
from evatune.pca.streaming import StreamingPCA
from evatune.pca.subspace import complete_basis
from evatune.pca.together import Task, Work, together


class StackedPCA(AnyPCA):
    """One `StreamingPCA` for each of several parts, seen as the PCA of the stacked input.

    Args:
        n_components: k; in a part with fewer than k features, the pieces of the later components are zero.
        widths: features of each part.
        new_pca: makes the PCA of a part with the given number of components.
        alike: the parts are samples of one space (all experts get rows of the same hidden states). A part with fewer
            rows than components then takes its pieces from all parts merged; otherwise it completes its own directions
            at random. In both cases only the variance of its own rows counts.

    Attributes: as those of `StreamingPCA`; `center` is that of the parts. `n_samples_seen_` counts the rows of all
        parts, and variances are means over the parts, weighted by their numbers of rows.

    Cost: that of its parts.
    """

    kind = "stacked"

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

    def partial_fit(self, rows: Sequence[Tensor], y: None = None) -> Self:
        """Add rows: one matrix (n, d) for each part, of which any may be empty.

        Raises:
            EvaError: `StreamingPCA.partial_fit` refuses the rows of a part.
        """
        return self.add(rows).settle()

    def add(self, rows: Sequence[Tensor]) -> Self:
        """Add rows to the parts as `StreamingPCA.add` does."""
        for part, rows_nd in zip(self.parts, rows, strict=True):
            part.add(rows_nd)
        return self

    def works(self, task: Task) -> list[Work]:
        """Return the work of the parts."""
        return [work for part in self.parts for work in part.works(task)]

    def snapshot(self) -> Snapshot:
        """Return the stacked components of the parts."""
        together(self.works(Task.SNAPSHOT))
        snapshots = [part.snapshot() for part in self._fitted()]
        own = [part.snapshot().components if part.is_fitted else None for part in self.parts]
        return Snapshot(
            components=self._stacked(own, lambda pca: pca.snapshot().components),
            singular_values=self._pooled_values([one.singular_values for one in snapshots]),
            total_variance=_pooled_variance([(one.total_variance, one.n_samples_seen) for one in snapshots]),
            n_samples_seen=self.n_samples_seen_,
        )

    def release(self) -> None:
        """Forget what each part can compute again."""
        for part in self.parts:
            part.release()

    def parkable(self) -> list[Parkable]:
        """Return the matrices of the parts."""
        return [matrix for part in self.parts for matrix in part.parkable()]

    def merge(self, other: StackedPCA) -> Self:
        """Return a new object that has seen the rows of both; its parts are `alike` if those of at least one are.

        Raises:
            EvaError: the two do not agree in their settings.
        """
        if self.widths != other.widths:
            raise EvaError(f"only equal stacks merge, but one has parts of {self.widths}, the other of {other.widths}.")
        parts = [mine.merge(theirs) for mine, theirs in zip(self.parts, other.parts, strict=True)]
        return self._of(parts, alike=self.alike or other.alike)

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
        return _pooled_variance([(part.total_variance_, part.n_samples_seen_) for part in self._fitted()])

    @property
    def captured_error_(self) -> float:
        """The largest of the parts' estimates; see `StreamingPCA`."""
        return max(part.captured_error_ for part in self._fitted())

    @property
    def singular_values_(self) -> Tensor:
        """Root of the summed squares of the parts' singular values, (k,)."""
        together(self.works(Task.LEARN))
        return self._pooled_values([part.singular_values_ for part in self._fitted()])

    @property
    def components_(self) -> Tensor:
        """Stacked components by descending variance, (k, D)."""
        together(self.works(Task.LEARN))
        own = [part.components_ if part.is_fitted else None for part in self.parts]
        return self._stacked(own, lambda pca: pca.components_)

    # -- exchange and saving ------------------------------------------------------------------------------------------

    def condensed(self) -> Self:
        """Return a stack of what `StreamingPCA.condensed` returns for each part."""
        return self._of([part.condensed() if part.is_fitted else part for part in self.parts], alike=self.alike)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of everything learned as a flat mapping of tensors; parts without rows have no entry."""
        state = {
            f"{_prefix(number)}{name}": tensor
            for number, part in enumerate(self.parts)
            if part.is_fitted
            for name, tensor in part.state_dict().items()
        }
        return state | {
            "kind": name_tensor(self.kind),
            "widths": torch.tensor(self.widths),
            "alike": torch.tensor(self.alike),
            "center": torch.tensor(self.center),
            "n_components": torch.tensor(self.n_components),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Return the object that a `state_dict` describes."""
        center = bool(state["center"])
        stacked = cls(
            int(state["n_components"]),
            widths=state["widths"].tolist(),
            new_pca=lambda n: StreamingPCA(n, center=center),
            alike=bool(state["alike"]),
        )
        for number, part in enumerate(stacked.parts):
            own = {
                name.removeprefix(_prefix(number)): tensor
                for name, tensor in state.items()
                if name.startswith(_prefix(number))
            }
            if own:
                part.load_state_dict(own)
        return stacked

    def cost(self, *, n_features: int) -> Cost:
        """Return the cost of all parts."""
        parts = total(part.cost(n_features=width) for part, width in zip(self.parts, self.widths, strict=True))
        own_bytes = SCALARS_BYTES + DOUBLE * len(self.parts)
        return replace(parts, state_bytes=parts.state_bytes + own_bytes, initial_bytes=parts.initial_bytes + own_bytes)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _of(self, parts: list[StreamingPCA], *, alike: bool) -> Self:
        """Return a stack of these parts, which has the widths of this one."""
        waiting = iter(parts)
        return type(self)(self.n_components, widths=self.widths, new_pca=lambda _: next(waiting), alike=alike)

    def _fitted(self) -> list[StreamingPCA]:
        fitted = [part for part in self.parts if part.is_fitted]
        if not fitted:
            raise NotFittedError("this StackedPCA has seen no rows yet; call partial_fit first.")
        return fitted

    def _pooled_values(self, of_parts: Sequence[Tensor]) -> Tensor:
        squares_k = of_parts[0].new_zeros(self.n_components)
        for values in of_parts:
            squares_k[: len(values)] += values.square()
        return squares_k.sqrt()

    def _stacked(self, of_parts: Sequence[Tensor | None], components_of: Callable[[StreamingPCA], Tensor]) -> Tensor:
        """Return the stacked components, (k, D).

        Args:
            of_parts: those of each part, (at most k, d); None for a part without rows.
            components_of: returns the components of a PCA in the same way; applied to all parts merged.
        """
        like = self._fitted()[0].mean_
        pooled_kd: Tensor | None = None
        pieces = []
        for number, (part, own_kd, width) in enumerate(zip(self.parts, of_parts, self.widths, strict=True)):
            n_kept = min(self.n_components, width)
            is_fed = own_kd is not None and (part.n_samples_seen_ >= n_kept or len(self.parts) == 1)
            if self.alike and not is_fed:
                if pooled_kd is None:
                    pooled_kd = components_of(functools.reduce(lambda a, b: a.merge(b), self._fitted()))
                piece_kd = pooled_kd
            elif own_kd is not None:
                piece_kd = own_kd  # completed at random if the part has few rows
            else:
                piece_kd = complete_basis(like.new_zeros(width, 0), n_kept, seed=number).T
            pieces.append(torch.nn.functional.pad(piece_kd, (0, 0, 0, self.n_components - n_kept)))
        return torch.cat(pieces, dim=1) / len(self.parts) ** 0.5


def _pooled_variance(of_parts: Sequence[tuple[float, int]]) -> float:
    """Return the mean of variances, each weighted by its number of rows."""
    scatter = sum(variance * max(n_rows - 1, 1) for variance, n_rows in of_parts)
    return scatter / max(sum(n_rows for _, n_rows in of_parts) - 1, 1)


def _prefix(number: int) -> str:
    """Return what the names of a part's tensors begin with in a `state_dict`."""
    return f"part.{number}."
