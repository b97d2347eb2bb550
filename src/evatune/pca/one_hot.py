"""Principal components of one-hot rows from counts alone: the rows that an embedding's low-rank update multiplies.

Shapes: n rows, V features (tokens), k components, u distinct counts.

The second moment of one-hot rows is diag(c), with the counts c. Centred, the scatter matrix is diag(c) - c cᵀ / n: a
diagonal, changed by rank one. Tokens with equal counts can be exchanged in it, so its eigenvectors are

- for each distinct count d, which m tokens share: m - 1 contrasts among these tokens, with eigenvalue d;
- the eigenvectors of the (u, u) matrix diag(d) - w wᵀ / n with w = d √m, spread evenly over the tokens of each count.

There are at most √(2n) distinct counts, because their sum is at most n. Nothing of size V × V is formed.

Reference: Golub (1973), Some modified matrix eigenvalue problems, for diagonals changed by rank one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.pca.contract import AnyPCA, NotFittedError, Snapshot, name_tensor
from evatune.pca.cost import DOUBLE, SCALARS_BYTES, Cost, components_bytes
from evatune.pca.parking import Parkable
from evatune.pca.products import unrounded
from evatune.pca.subspace import fix_signs
from evatune.pca.together import Eigh, Steps, Task, Work, together


class OneHotPCA(AnyPCA):
    """The principal components of one-hot rows, in the contract of `StreamingPCA`; rows are given as token numbers.

    Args:
        n_components: how many components to keep, at most `n_features`.
        n_features: V, how many tokens there are.
        center: subtract the mean; without it, components are the most frequent tokens themselves.

    Attributes: as those of `StreamingPCA`.

    Cost: O(n) a batch; O(u³ + k V) with u <= √(2n) when components are asked for. Memory: O(V), and O(k V) for the
    components, which are dense.

    Example:
        >>> import torch
        >>> pca = OneHotPCA(2, n_features=5).partial_fit(torch.tensor([0, 0, 0, 3, 3, 1]))
        >>> pca.components_.shape, pca.n_samples_seen_
        (torch.Size([2, 5]), 6)
    """

    kind = "counts"

    def __init__(self, n_components: int, *, n_features: int, center: bool = True) -> None:
        self.n_components = min(n_components, n_features)
        self._n_features = n_features
        self.center = center
        self._counts_v: Tensor | None = None
        self._n_rows = 0  # so that asking for it needs no sum
        self._decomposition: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def partial_fit(self, rows: Tensor, y: None = None) -> Self:
        """Add rows.

        Args:
            rows: token numbers, (n,), of any integer dtype.
            y: ignored; part of the contract.

        Raises:
            EvaError: the rows are not whole numbers of shape (n,), or a number is outside 0 ... V - 1. Nothing is added
                then.
        """
        if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise EvaError(f"one-hot rows are given as whole numbers of shape (n,), got {tuple(rows.shape)}.")
        if not len(rows):
            return self
        if self._counts_v is None:
            self._counts_v = torch.zeros(self.n_features_in_, dtype=torch.int64, device=rows.device)
        tokens_n = rows.to(torch.int64)
        if tokens_n.device.type == "cpu" and not 0 <= int(tokens_n.min()) <= int(tokens_n.max()) < self.n_features_in_:
            raise EvaError(f"token numbers must be between 0 and {self.n_features_in_ - 1}.")
        self._counts_v.index_add_(0, tokens_n, torch.ones_like(tokens_n))
        self._n_rows += len(tokens_n)
        self._decomposition = None
        return self

    def add(self, rows: Tensor) -> Self:
        """Add rows; no work is left for `settle`."""
        return self.partial_fit(rows)

    def snapshot(self) -> Snapshot:
        """Return the components, exact ones: with counts no cheaper way is needed."""
        return Snapshot(
            components=self.components_,
            singular_values=self.singular_values_.cpu(),
            total_variance=self.total_variance_,
            n_samples_seen=self._n_rows,
        )

    def release(self) -> None:
        """Do nothing: there are only counts."""

    def parkable(self) -> list[Parkable]:
        """Return nothing: counts are small."""
        return []

    def works(self, task: Task) -> list[Work]:
        """Return the work of finding the components; `SETTLE` and `REFRESH` have none."""
        is_left = self._counts_v is not None and self._decomposition is None
        return [Work(self._learn())] if is_left and task in (Task.SNAPSHOT, Task.LEARN) else []

    def merge(self, other: OneHotPCA) -> Self:
        """Return a new object that has seen the rows of both.

        Raises:
            EvaError: the two do not agree in components, features or centring.
        """
        for name in ("n_components", "n_features_in_", "center"):
            if getattr(self, name) != getattr(other, name):
                raise EvaError(
                    f"only equal settings merge, but {name} is {getattr(self, name)} here and "
                    f"{getattr(other, name)} there."
                )
        result = type(self)(self.n_components, n_features=self.n_features_in_, center=self.center)
        counts = [pca._counts_v for pca in (self, other) if pca._counts_v is not None]
        result._n_rows = self._n_rows + other._n_rows
        if counts:
            result._counts_v = torch.stack([c.to(counts[0].device) for c in counts]).sum(dim=0)
        return result

    def scatter_along(self, directions_kv: Tensor) -> Tensor:
        """Return Σ (vᵀ(x - m))² over the rows seen, for every row v of `directions_kv`, (k,)."""
        counts_v = self._fitted().to(directions_kv)
        with unrounded(counts_v.device):
            energies_k = directions_kv.square() @ counts_v
            sums_k = directions_kv @ counts_v
        return energies_k - sums_k.square() / self._n_rows if self.center else energies_k

    # -- what was learned ---------------------------------------------------------------------------------------------

    @property
    def is_fitted(self) -> bool:
        """Whether any row was seen."""
        return self._counts_v is not None

    @property
    def n_components_(self) -> int:
        """How many components are kept."""
        return self.n_components

    @property
    def n_features_in_(self) -> int:
        """How many tokens there are, V."""
        return self._n_features

    @property
    def backend_(self) -> str:
        """The name of its only backend: counts."""
        return self.kind

    @property
    def n_samples_seen_(self) -> int:
        """How many rows were seen."""
        self._fitted()
        return self._n_rows

    @property
    def mean_(self) -> Tensor:
        """Share of each token, (V,)."""
        counts_v = self._fitted()
        return (counts_v / counts_v.sum()).float()

    @property
    def total_variance_(self) -> float:
        """Sum of the variances of all features."""
        counts_v = self._fitted().double()
        n = counts_v.sum()
        scatter = n - counts_v.square().sum() / n if self.center else n
        return float(scatter / (n - 1).clamp_min(1))

    @property
    def captured_error_(self) -> float:
        """Zero: counts lose nothing."""
        return 0.0

    @property
    def components_(self) -> Tensor:
        """Orthonormal rows by descending variance, (k, V)."""
        return self._decompose()[0]

    @property
    def singular_values_(self) -> Tensor:
        """Singular values of the centred rows, (k,)."""
        return self._decompose()[1]

    def condensed(self) -> Self:
        """Return this object: its counts take less memory than its components."""
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of everything learned as a flat mapping of tensors."""
        return {
            "kind": name_tensor(self.kind),
            "counts": self._fitted().clone(),
            "center": torch.tensor(self.center),
            "n_components": torch.tensor(self.n_components),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Return the object that a `state_dict` describes."""
        counts_v = state["counts"].clone()
        pca = cls(int(state["n_components"]), n_features=len(counts_v), center=bool(state["center"]))
        pca._counts_v, pca._n_rows = counts_v, int(counts_v.sum())
        return pca

    def cost(self, *, n_features: int) -> Cost:
        """Return the cost of a counter for each token."""
        state_bytes = SCALARS_BYTES + DOUBLE * n_features
        return Cost(
            backend=self.kind,
            state_bytes=state_bytes,
            initial_bytes=state_bytes,
            cached_bytes=components_bytes(self.n_components, n_features),
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _fitted(self) -> Tensor:
        if self._counts_v is None:
            raise NotFittedError("this OneHotPCA has seen no rows yet; call partial_fit first.")
        return self._counts_v

    def _decompose(self) -> tuple[Tensor, Tensor]:
        self._fitted()
        together(self.works(Task.LEARN))
        assert self._decomposition is not None
        return self._decomposition

    def _learn(self) -> Steps[None]:
        counts_v = self._fitted()
        components_kv, scatter_k = yield from _leading(counts_v.cpu(), self.n_components, center=self.center)
        self._decomposition = (
            fix_signs(components_kv).float().to(counts_v.device),
            scatter_k.clamp_min(0.0).sqrt().float().to(counts_v.device),
        )


def _leading(counts_v: Tensor, k: int, *, center: bool) -> Steps[tuple[Tensor, Tensor]]:
    """Return the leading k eigenvectors of the scatter matrix in rows (k, V) and its eigenvalues, both in float64."""
    # Equal counts are ordered by token number, so that equal data give equal components.
    order_v = torch.sort(counts_v, descending=True, stable=True).indices
    distinct_u, size_u = torch.unique_consecutive(counts_v[order_v], return_counts=True)
    start_u = size_u.cumsum(0) - size_u
    components_kv = torch.zeros(k, len(counts_v), dtype=torch.float64, device="cpu")
    if not center:
        components_kv[torch.arange(k, device="cpu"), order_v[:k]] = 1.0
        return components_kv, counts_v[order_v[:k]].double()

    d_u, size_double_u = distinct_u.double(), size_u.double()
    w_u = d_u * size_double_u.sqrt()
    values_u, vectors_uu = yield Eigh(torch.diag(d_u) - torch.outer(w_u, w_u) / counts_v.sum())
    # (eigenvalue, group or None, number): the number of a contrast in its group, or of an eigenvector of the groups.
    found: list[tuple[float, int | None, int]] = [(float(value), None, j) for j, value in enumerate(values_u)]
    for number, (value, size) in enumerate(zip(d_u.tolist(), size_u.tolist(), strict=True)):
        found += [(value, number, j) for j in range(1, min(size, k + 1))]
    found.sort(key=lambda item: -item[0])
    for row_v, (_, group, j) in zip(components_kv, found[:k], strict=True):
        if group is None:
            row_v[order_v] = (vectors_uu[:, j] / size_double_u.sqrt()).repeat_interleave(size_u)
        else:  # one token against the j before it (Helmert)
            tokens_m = order_v[start_u[group] : start_u[group] + j + 1]
            row_v[tokens_m[:j]], row_v[tokens_m[j]] = 1.0, -float(j)
            row_v /= (j * (j + 1)) ** 0.5
    return components_kv, torch.tensor([value for value, _, _ in found[:k]], dtype=torch.float64, device="cpu")
