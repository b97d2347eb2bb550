"""`StreamingPCA`: principal components of rows that arrive in batches, in memory that does not grow with them.

Shapes: n rows, d features, k components.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from evatune.errors import EvaError, EvaWarning, near_misses
from evatune.pca.exact import ExactState
from evatune.pca.incremental import IncrementalState
from evatune.pca.learned import LearnedPCA
from evatune.pca.moments import Moments
from evatune.pca.products import choose_product_dtype, unrounded
from evatune.pca.sketch import EXACT_UP_TO, SketchState, sketch_width
from evatune.pca.subspace import complete_basis, fix_signs
from evatune.pca.threads import one_thread

BACKENDS = ("auto", "exact", "sketch", "incremental")


class NotFittedError(EvaError, AttributeError):
    """A learned attribute was read before any row was seen."""


class _State(Protocol):
    """What a backend accumulates; each backend is one file. An update may give way to another state."""

    def update(self, shifted_nd: Tensor, moments: Moments, *, center: bool, product_dtype: torch.dtype) -> Any: ...

    def merged(self, other: Any, mine: Moments, theirs: Moments, *, center: bool) -> Any: ...

    def tensors(self) -> dict[str, Tensor]: ...


_STATES: dict[str, type[ExactState] | type[SketchState] | type[IncrementalState]] = {
    "exact": ExactState,
    "sketch": SketchState,
    "incremental": IncrementalState,
}


class StreamingPCA(LearnedPCA):
    """Principal component analysis over batches of rows, in the estimator contract of scikit-learn.

    The covariance of the rows is C = Σ (x - m)(x - m)ᵀ / (M - 1); the components are its leading eigenvectors, which
    are the leading right-singular vectors of the centred rows (Theorem 3.1 and Appendix H of the paper).

    Args:
        n_components: how many components to keep; clipped, with a warning, to the number of features.
        backend: "exact" accumulates the (d, d) second moment and does not depend on the order of batches; "sketch"
            accumulates a thin (d, l) sketch and is the fast one for wide rows; "incremental" is Algorithm 2 of the
            paper and its reference; "auto" takes "exact" for rows of up to 2048 features, and wider ones where a
            sketch would not be much thinner, and else "sketch".
        center: subtract the running mean, as Algorithm 2 does. `False` gives the uncentred second moment E[xxᵀ] of
            Theorem 3.2.
        seed: of the sketch's first test matrix. Equal rows and equal seed give equal components.
        product_dtype: dtype of the matrix products, or "auto" (see `evatune.pca.products.choose_product_dtype`).
            Sums are kept in float32, or in float64 for float64 rows.
        tolerance: share of the variance that the best k components capture that a sketch may miss (and a tenth of it
            for the first half of them); in proportion more until there are 2k² rows. One that seems to miss more gets
            wider at its next refresh, up to four times the columns it has beside the components', or turns into the
            exact second moment for rows of up to 2048 features. None leaves it as it is.
        rough_looks: until `refresh` is called, take only one round of iteration from the components last asked for when
            they are asked for again, which is enough to watch them. Concerns wide rows with the backend "exact".

    Attributes:
        components_: (k, d), orthonormal rows by descending variance; the largest entry of each is positive.
        singular_values_: (k,), of the centred rows; σ² / (M - 1) is the variance along a component.
        explained_variance_: (k,).
        explained_variance_ratio_: (k,), share of the total variance; zeros where the rows never vary.
        mean_: (d,).
        var_: (d,), with M - 1 in the denominator.
        n_samples_seen_: M.
        n_components_: k, after clipping.
        n_features_in_: d.
        backend_: the backend in use.
        captured_error_: estimated share of the variance that the best k components capture that these miss.

    Cost for a batch of n rows: O(n d²) exact, O(n d l) sketch with l of about k + 96, O((n + k) d min(n + k, d))
    incremental. Memory: O(d²), O(d l), O(d k).

    Example:
        >>> import torch
        >>> from evatune import StreamingPCA
        >>> pca = StreamingPCA(2)
        >>> for batch in torch.randn(8, 100, 16, generator=torch.Generator().manual_seed(0)):
        ...     pca = pca.partial_fit(batch)
        >>> pca.components_.shape, pca.n_samples_seen_
        (torch.Size([2, 16]), 800)
    """

    def __init__(
        self,
        n_components: int,
        *,
        backend: str = "auto",
        center: bool = True,
        seed: int = 0,
        product_dtype: str | torch.dtype = "auto",
        tolerance: float | None = 1e-3,
        rough_looks: bool = False,
    ) -> None:
        if isinstance(n_components, bool) or not isinstance(n_components, int) or n_components < 1:
            raise EvaError(f"n_components must be a whole number of at least 1, got {n_components!r}.")
        if backend not in BACKENDS:
            raise EvaError(
                f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}{near_misses(backend, BACKENDS)}."
            )
        if not (isinstance(product_dtype, torch.dtype) or product_dtype == "auto"):
            raise EvaError(f"product_dtype must be a torch dtype or 'auto', got {product_dtype!r}.")
        if tolerance is not None and not 0 < tolerance < 1:
            raise EvaError(f"tolerance must be between 0 and 1, or None, got {tolerance!r}.")
        self.n_components = n_components
        self.backend = backend
        self.center = center
        self.seed = seed
        self.product_dtype = product_dtype
        self.tolerance = tolerance
        self.rough_looks = rough_looks
        self._rough = False
        self._moments: Moments | None = None
        self._state: _State | None = None
        self._decomposition: tuple[Tensor, Tensor] | None = None

    # -- learning -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def partial_fit(self, rows: Tensor, y: None = None) -> StreamingPCA:
        """Add rows.

        Args:
            rows: (n, d), any float dtype and device; n may be 0 or smaller than `n_components`. Not changed, not kept.
            y: ignored; part of the contract.

        Returns:
            This object.

        Raises:
            EvaError: the rows are not a float matrix, have another width than before, or hold NaN or infinite values.
                Nothing is added then. On accelerators, where looking would stall the device, NaN and infinite values
                are reported when the components are next asked for.
        """
        self._check_rows(rows)
        if rows.shape[0] == 0:
            return self
        first = self._moments is None
        # The first rows choose the dtype of all sums; rows of another dtype may follow.
        if self._moments is not None:
            dtype = self._moments.shift_d.dtype
        else:
            dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        rows_nd = rows.detach().to(dtype)
        shift_d = self._first_shift(rows_nd) if self._moments is None else self._moments.shift_d.to(rows_nd)
        shifted_nd = rows_nd - shift_d
        batch = Moments.around(shift_d)
        batch.update(shifted_nd)
        if rows.device.type == "cpu":
            _refuse_non_finite(rows, batch.squares_d)
        if first:
            self._moments = Moments.around(shift_d)
            self._state = self._start(shifted_nd)
        assert self._moments is not None and self._state is not None
        self._moments = self._moments.plus(batch)
        product_dtype = choose_product_dtype(rows, self.product_dtype, n_components=self.n_components)
        with unrounded(rows):
            self._state = self._state.update(shifted_nd, self._moments, center=self.center, product_dtype=product_dtype)
        self._decomposition, self._rough = None, self.rough_looks
        return self

    @torch.no_grad()
    def refresh(self) -> StreamingPCA:
        """Fold the rows since the last refresh into the sketch's basis, and let the next look be a thorough one.

        Right after it the state is at its smallest, which is what processes exchange.
        """
        moments = self._fitted()
        if isinstance(self._state, SketchState):
            with unrounded(moments.shift_d):
                self._state.refresh(moments, center=self.center)
        self._decomposition, self._rough = None, False
        return self

    def fit(self, rows: Tensor, y: None = None) -> StreamingPCA:
        """Forget everything and learn from one matrix of rows, (n, d)."""
        self._moments = self._state = self._decomposition = None
        return self.partial_fit(rows)

    def transform(self, rows: Tensor) -> Tensor:
        """Return the coordinates of rows (n, d) along the components, (n, k), in the dtype of the rows."""
        mean_d, components_kd = self.mean_, self.components_
        centred_nd = rows - mean_d.to(rows) if self.center else rows
        return centred_nd @ components_kd.to(rows).T

    @torch.no_grad()
    def merge(self, other: StreamingPCA) -> StreamingPCA:
        """Return a new object that has seen the rows of both.

        The backend "exact" loses nothing; the others merge their truncated eigenpairs. Neither operand changes.

        Args:
            other: fitted with the same number of components and features, backend and centring.

        Raises:
            EvaError: the two do not agree in one of these.
        """
        for name in ("n_components", "center"):
            if getattr(self, name) != getattr(other, name):
                mine, theirs = getattr(self, name), getattr(other, name)
                raise EvaError(f"only equal settings merge, but {name} is {mine!r} here and {theirs!r} there.")
        result = StreamingPCA(
            self.n_components,
            backend=self.backend,
            center=self.center,
            seed=self.seed,
            product_dtype=self.product_dtype,
            tolerance=self.tolerance,
            rough_looks=self.rough_looks,
        )
        if self._moments is None or other._moments is None:
            source = other if self._moments is None else self
            return result.load_state_dict(source.state_dict()) if source._moments is not None else result
        for name in ("n_features_in_", "backend_"):
            mine, theirs = getattr(self, name), getattr(other, name)
            # A sketch may have turned into an exact moment in one process and not in the other.
            if mine != theirs and {mine, theirs} != {"exact", "sketch"}:
                raise EvaError(f"only equal inputs merge, but {name} is {mine!r} here and {theirs!r} there.")
        assert self._state is not None
        device = self._moments.shift_d.device
        theirs_moved = StreamingPCA(self.n_components, center=self.center)
        theirs_moved.load_state_dict(other.state_dict(), device=device)
        assert theirs_moved._moments is not None
        result._moments = self._moments.merged(theirs_moved._moments)
        if self.backend_ == other.backend_:
            first, second = self._state, theirs_moved._state
        else:
            first, second = self._exactly(), theirs_moved._exactly()
        with unrounded(self._moments.shift_d):
            result._state = first.merged(second, self._moments, theirs_moved._moments, center=self.center)
        return result

    @torch.no_grad()
    def scatter_along(self, directions_kd: Tensor) -> Tensor:
        """Return Σ (vᵀ(x - m))² over the rows seen, for every row v of `directions_kd`, (k,).

        From the second moment with the backend "exact", O(d² k), and else from the eigenpairs that are kept.
        """
        moments = self._fitted()
        with unrounded(moments.shift_d):
            if isinstance(self._state, ExactState):
                return self._state.scatter_along(directions_kd, moments, center=self.center)
            assert isinstance(self._state, SketchState | IncrementalState)
            with one_thread():
                vectors_dp, values_p = self._state.decompose(moments, center=self.center)
            return (directions_kd.to(vectors_dp) @ vectors_dp).square() @ values_p

    # -- what was learned ---------------------------------------------------------------------------------------------

    @property
    def is_fitted(self) -> bool:
        """Whether any row was seen."""
        return self._moments is not None

    @property
    def components_(self) -> Tensor:
        """Orthonormal rows by descending variance, (k, d)."""
        return self._decompose()[0]

    @property
    def singular_values_(self) -> Tensor:
        """Singular values of the centred rows, (k,)."""
        return self._decompose()[1]

    @property
    def captured_error_(self) -> float:
        """Estimated share of the variance that the best k components capture that these miss; NaN where unknown.

        Zero for the backend "exact", unless it began as a sketch. For "sketch" see
        `evatune.pca.sketch.SketchState.missed_share`; for "incremental" nothing is known.
        """
        moments = self._fitted()
        if isinstance(self._state, SketchState):
            with torch.no_grad(), unrounded(moments.shift_d):
                return self._state.missed_share(moments, center=self.center)
        if not isinstance(self._state, ExactState):
            return math.nan
        captured = float(self.singular_values_.square().sum()) if self._state.missed else 1.0
        return min(self._state.missed / captured, 1.0) if captured > 0 else 0.0

    @property
    def total_variance_(self) -> float:
        """Sum of the variances of all features."""
        return float(self._fitted().variance_d(center=self.center).sum())

    @property
    def mean_(self) -> Tensor:
        """Mean of the rows, (d,)."""
        moments = self._fitted()
        return moments.mean_d.to(moments.shift_d.dtype)

    @property
    def var_(self) -> Tensor:
        """Variance of each feature, (d,); about zero if `center` is false."""
        moments = self._fitted()
        return moments.variance_d(center=self.center).to(moments.shift_d.dtype)

    @property
    def n_samples_seen_(self) -> int:
        """How many rows were seen."""
        return self._fitted().n_rows

    @property
    def n_features_in_(self) -> int:
        """How wide the rows are."""
        return self._fitted().shift_d.shape[0]

    @property
    def n_components_(self) -> int:
        """How many components are kept, after clipping to the number of features."""
        return min(self.n_components, self.n_features_in_)

    @property
    def backend_(self) -> str:
        """The backend in use."""
        self._fitted()
        return next(name for name, state in _STATES.items() if isinstance(self._state, state))

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything learned as a flat mapping of tensors, ready for safetensors."""
        moments = self._fitted()
        assert self._state is not None
        state = {
            f"state.{name}": tensor.detach().clone().contiguous() for name, tensor in self._state.tensors().items()
        }
        return state | {
            "backend": torch.tensor(list(_STATES).index(self.backend_)),
            "center": torch.tensor(self.center),
            "n_components": torch.tensor(self.n_components),
            "n_samples_seen": torch.tensor(moments.n_rows),
            "shift": moments.shift_d.clone(),
            "sum": moments.sum_d.clone(),
            "squares": moments.squares_d.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor], *, device: torch.device | str | None = None) -> StreamingPCA:
        """Continue from what `state_dict` returned, optionally on another device.

        Raises:
            EvaError: an entry is missing, or the state is of another backend or centring, or keeps fewer components,
                than this object asks for. Nothing is loaded then.
        """
        missing = {"backend", "center", "n_components", "n_samples_seen", "shift", "sum", "squares"} - set(state)
        if missing:
            raise EvaError(f"this is not a state of StreamingPCA: {', '.join(sorted(missing))} missing.")
        backend = list(_STATES)[int(state["backend"])]
        if self.backend not in ("auto", backend) and (self.backend, backend) != ("sketch", "exact"):
            raise EvaError(
                f"the state is of backend {backend!r}, but this object was made with backend={self.backend!r}."
            )
        if bool(state["center"]) != self.center:
            raise EvaError(
                f"the state has center={bool(state['center'])}, but this object was made with center={self.center}."
            )
        n_kept = int(state["n_components"])
        if backend != "exact" and min(self.n_components, state["shift"].shape[0]) > n_kept:
            raise EvaError(f"the state keeps n_components={n_kept}, but this object asks for {self.n_components}.")
        own = {name: tensor.clone() if device is None else tensor.to(device) for name, tensor in state.items()}
        prefix = "state."
        moments = Moments(
            shift_d=own["shift"], sum_d=own["sum"], squares_d=own["squares"], n_rows=int(own["n_samples_seen"])
        )
        tensors = {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
        try:
            backend_state = self._state_of(backend, tensors, moments)
        except KeyError as error:
            raise EvaError(f"this is not a state of StreamingPCA: {prefix}{error.args[0]} missing.") from None
        self._state, self._moments, self._decomposition = backend_state, moments, None
        self._rough = self.rough_looks
        return self

    # -- inside -------------------------------------------------------------------------------------------------------

    def _check_rows(self, rows: Tensor) -> None:
        if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
            found = f"{tuple(rows.shape)} of {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
            raise EvaError(f"rows must be a float tensor of shape (n_rows, n_features), got {found}.")
        if rows.shape[1] == 0:
            raise EvaError("rows must have at least one feature, got shape " + str(tuple(rows.shape)) + ".")
        if self._moments is not None and rows.shape[1] != self.n_features_in_:
            raise EvaError(f"rows have {rows.shape[1]} features, but the rows before had {self.n_features_in_}.")

    def _first_shift(self, rows_nd: Tensor) -> Tensor:
        return rows_nd.mean(dim=0) if self.center else torch.zeros_like(rows_nd[0])

    def _start(self, rows_nd: Tensor) -> _State:
        n_features = rows_nd.shape[1]
        if self.n_components > n_features:
            warnings.warn(
                f"n_components={self.n_components} is clipped to the {n_features} features of the rows.",
                EvaWarning,
                stacklevel=3,
            )
        n_components = min(self.n_components, n_features)
        backend = choose_backend(self.backend, n_components, n_features)
        if backend == "exact":
            return ExactState.start(rows_nd)
        if backend == "sketch":
            return SketchState.start(rows_nd, n_components, tolerance=self.tolerance, seed=self.seed)
        return IncrementalState.start(rows_nd, n_components)

    def _state_of(self, backend: str, tensors: dict[str, Tensor], moments: Moments) -> _State:
        if backend == "exact":
            return ExactState.from_tensors(tensors)
        if backend == "incremental":
            return IncrementalState.from_tensors(tensors)
        n_components = min(self.n_components, moments.shift_d.shape[0])
        return SketchState.from_tensors(
            tensors, moments, center=self.center, n_components=n_components, tolerance=self.tolerance
        )

    def _exactly(self) -> ExactState:
        """Return the state as an exact one; of a sketch, what it knows."""
        if isinstance(self._state, ExactState):
            return self._state
        assert isinstance(self._state, SketchState) and self._moments is not None
        return self._state.exactly(self._moments, center=self.center)

    def _fitted(self) -> Moments:
        if self._moments is None:
            raise NotFittedError("this StreamingPCA has seen no rows yet; call partial_fit first.")
        return self._moments

    def _decompose(self) -> tuple[Tensor, Tensor]:
        moments = self._fitted()
        if self._decomposition is None:
            if not torch.isfinite(moments.squares_d).all():
                raise EvaError("the rows seen so far hold NaN or infinite values; check the model's activations.")
            with torch.no_grad(), unrounded(moments.shift_d):
                self._decomposition = self._factorize(moments)
        return self._decomposition

    def _factorize(self, moments: Moments) -> tuple[Tensor, Tensor]:
        if isinstance(self._state, ExactState):
            vectors_dp, values_p = self._state.decompose(
                moments, center=self.center, n_pairs=self.n_components_, rough=self._rough
            )
        else:
            assert isinstance(self._state, SketchState | IncrementalState)
            with one_thread():
                vectors_dp, values_p = self._state.decompose(moments, center=self.center)
        # Rows that span fewer directions than asked for leave singular values of zero, with any orthonormal vectors.
        n_known = min(self.n_components_, values_p.shape[0])
        basis_dk = complete_basis(vectors_dp[:, :n_known], self.n_components_, seed=self.seed)
        values_k = torch.zeros(self.n_components_, dtype=values_p.dtype, device=values_p.device)
        values_k[:n_known] = values_p[:n_known].sqrt()
        return fix_signs(basis_dk.T).contiguous().to(moments.shift_d), values_k.to(moments.shift_d)


def choose_backend(backend: str, n_components: int, n_features: int) -> str:
    """Return the backend in use where `backend` was asked for, for so many components of so many features."""
    if backend == "sketch" and sketch_width(n_components, n_features) == n_features:
        return "exact"  # a sketch of all there is would only be less precise
    if backend != "auto":
        return backend
    return "exact" if n_features <= max(EXACT_UP_TO, 2 * sketch_width(n_components, n_features)) else "sketch"


def _refuse_non_finite(rows_nd: Tensor, squares_d: Tensor) -> None:
    if torch.isfinite(squares_d).all():
        return
    n_bad = int((~torch.isfinite(rows_nd).all(dim=1)).sum())
    if n_bad:
        raise EvaError(
            f"{n_bad} of {rows_nd.shape[0]} rows hold NaN or infinite values; nothing was added. "
            "Check the model's activations, or its dtype: float16 overflows where bfloat16 and float32 do not."
        )
    raise EvaError("the squares of the rows overflow; pass the rows as float64.")
