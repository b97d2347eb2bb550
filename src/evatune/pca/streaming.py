"""`StreamingPCA`: principal components of rows that arrive in batches, in memory that does not grow with them.

Shapes: n rows, d features, k components.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from evatune.errors import EvaError, EvaWarning, near_misses
from evatune.pca.backend import State, Wanted
from evatune.pca.backends import AUTO, BACKENDS, STATES, choose_backend
from evatune.pca.checks import check_finite, check_rows, refuse_non_finite
from evatune.pca.contract import AnyPCA, NotFittedError, Snapshot, name_tensor, read_name
from evatune.pca.cost import Cost
from evatune.pca.moments import Moments, with_total_variance
from evatune.pca.parking import Parkable
from evatune.pca.products import PRODUCT_DTYPES, choose_product_dtype, unrounded
from evatune.pca.subspace import complete_basis, own, signed_components
from evatune.pca.together import Host, Steps, Task, Work, alone, batched, together


class _Found(NamedTuple):
    """What was found of the rows so far; see the attributes of `StreamingPCA`."""

    components: Tensor
    singular_values: Tensor
    total_variance: float
    captured_error: float


class StreamingPCA(AnyPCA):
    """Principal component analysis over batches of rows, in the estimator contract of scikit-learn.

    The covariance of the rows is C = Σ (x - m)(x - m)ᵀ / (M - 1); the components are its leading eigenvectors, which
    are the leading right-singular vectors of the centred rows (Theorem 3.1 and Appendix H of the paper).

    Args:
        n_components: how many components to keep; clipped, with a warning, to the number of features.
        backend: "exact" accumulates the (d, d) second moment and does not depend on the order of batches; "sketch"
            accumulates a thin (d, l) sketch and is the fast one for wide rows; "incremental" is Algorithm 2 of the
            paper and its reference; "auto" takes "exact" for rows of up to 2048 features, and for wider rows if a
            sketch would not be much thinner; otherwise "sketch".
        center: subtract the running mean, as Algorithm 2 does. `False` gives the uncentred second moment E[xxᵀ] of
            Theorem 3.2.
        seed: seed of the first test matrix of a sketch. Equal rows and equal seed give equal components.
        product_dtype: dtype of the matrix products, or "auto" (see `evatune.pca.products.choose_product_dtype`).
            Sums are kept in float32, or in float64 for float64 rows.
        tolerance: how much a sketch may miss, as a share of the variance that the best k components capture; the first
            half of the components may miss a tenth of it. With n < 2k² rows it is larger by the factor 2k² / n. A
            sketch that seems to miss more gets wider at its next refresh, up to four times its spare columns (those
            beside the k of the components); for rows of up to 2048 features it then turns into the exact second
            moment. With None a sketch never changes.

    Attributes:
        components_: (k, d), orthonormal rows by descending variance; the largest entry of each is positive.
        singular_values_: (k,), of the centred rows; σ² / (M - 1) is the variance along a component.
        explained_variance_: (k,).
        explained_variance_ratio_: (k,), share of the total variance; zeros if all rows are equal.
        mean_: (d,).
        var_: (d,), with M - 1 in the denominator.
        n_samples_seen_: M.
        n_components_: k, after clipping.
        n_features_in_: d.
        backend_: the backend in use.
        captured_error_: estimate of what these components miss, as a share of what the best k would capture.

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

    kind = "streaming"

    def __init__(
        self,
        n_components: int,
        *,
        backend: str = AUTO,
        center: bool = True,
        seed: int = 0,
        product_dtype: str | torch.dtype = "auto",
        tolerance: float | None = 1e-3,
    ) -> None:
        if isinstance(n_components, bool) or not isinstance(n_components, int) or n_components < 1:
            raise EvaError(f"n_components must be a whole number of at least 1, got {n_components!r}.")
        if backend not in BACKENDS:
            raise EvaError(
                f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}{near_misses(backend, BACKENDS)}."
            )
        if product_dtype not in ("auto", *PRODUCT_DTYPES):
            offered = ", ".join(map(str, PRODUCT_DTYPES))
            raise EvaError(f"product_dtype must be 'auto' or one of {offered}, got {product_dtype!r}.")
        if tolerance is not None and not 0 < tolerance < 1:
            raise EvaError(f"tolerance must be between 0 and 1, or None, got {tolerance!r}.")
        self.n_components = n_components
        self.backend = backend
        self.center = center
        self.seed = seed
        self.product_dtype = product_dtype
        self.tolerance = tolerance
        self._state: State | None = None
        # Results for the rows so far:
        self._found: _Found | None = None
        self._snapshot: Snapshot | None = None

    # -- learning -----------------------------------------------------------------------------------------------------

    def partial_fit(self, rows: Tensor, y: None = None) -> Self:
        """Add rows, and settle.

        Args:
            rows: (n, d), any float dtype and device; n may be 0 or smaller than `n_components`. Not changed, not kept.
            y: ignored; part of the contract.

        Returns:
            This object.

        Raises:
            EvaError: the rows are not a float matrix, have another width than before, or hold NaN or infinite values.
                Nothing is added then. On accelerators, where checking would stall the device, NaN and infinite values
                are reported when the components are next read.
        """
        self.add(rows)
        return self.settle()

    @torch.no_grad()
    def add(self, rows: Tensor) -> Self:
        """Add rows as `partial_fit` does, but leave work that is more expensive than matrix products for `settle`.

        A caller with many inputs settles them together (`evatune.pca.settle_all`).
        """
        check_rows(rows, n_features=None if self._state is None else self._state.n_features)
        if rows.shape[0] == 0:
            return self
        rows = rows.detach()
        product_dtype = choose_product_dtype(rows, self.product_dtype, n_components=self.n_components)
        state = self._state
        moments = Moments.about(rows, center=self.center) if state is None else state.moments
        needs_all_digits = state is None or state.needs_full_precision
        shifted_nd = moments.shifted(rows, wanted=moments.shift_d.dtype if needs_all_digits else product_dtype)
        moments = moments.with_rows(shifted_nd)
        if rows.device.type == "cpu":
            refuse_non_finite(rows, moments.squares_d)
        if state is None:
            state = self._state = self._start(moments)
        state.moments = moments
        with unrounded(rows.device):
            state.update(shifted_nd, product_dtype=product_dtype)
        self._forget()
        return self

    def works(self, task: Task) -> list[Work]:
        """Return the open work of a task."""
        state = self._state
        if state is None:
            return []
        algorithm, is_left = {
            Task.SETTLE: (self._settle, state.is_due),
            Task.REFRESH: (self._refresh, True),
            Task.SNAPSHOT: (self._take_snapshot, self._snapshot is None),
            Task.LEARN: (self._learn, self._found is None),
        }[task]
        if not is_left:
            return []
        return [Work(algorithm(), n_bytes=state.working_bytes, device=state.moments.shift_d.device)]

    def fit(self, rows: Tensor, y: None = None) -> Self:
        """Forget everything and learn from one matrix of rows, (n, d)."""
        self._state = None
        self._forget()
        return self.partial_fit(rows)

    def refresh(self) -> Self:
        """Fold the rows since the last refresh into the sketch's basis; the state is then as small as it can be."""
        self._fitted()
        return super().refresh()

    def release(self) -> None:
        """Forget the eigenpairs that a sketch keeps from its last factorization until rows are added."""
        if self._state is not None:
            self._state.release()

    def parkable(self) -> list[Parkable]:
        """Return the matrices of a sketch."""
        return [] if self._state is None else self._state.parkable()

    @torch.no_grad()
    def merge(self, other: StreamingPCA) -> Self:
        """Return a new object that has seen the rows of both.

        The backend "exact" loses nothing; the others merge their truncated eigenpairs. Neither operand changes.

        Args:
            other: fitted with the same number of components and features, backend and centring.

        Raises:
            EvaError: the two do not agree in one of these.
        """
        is_empty = self._state is None or other._state is None
        for name in ("n_components", "center") if is_empty else ("n_components", "center", "n_features_in_"):
            if getattr(self, name) != getattr(other, name):
                raise self._disagreement(other, name)
        if self._state is None or other._state is None:
            only = self._state or other._state
            return self._of(only and only.copied(only.moments.shift_d.device))
        like_d = self._state.moments.shift_d
        mine, theirs = self._state, other._state
        with unrounded(like_d.device):
            if theirs.moments.shift_d.device != like_d.device:
                theirs = theirs.copied(like_d.device)
            if mine.name == theirs.name:
                return self._of(mine.merged(theirs))
            # A sketch may have turned into an exact moment in one of two processes.
            exact, other_exact = mine.exactly(), theirs.exactly()
            if exact is None or other_exact is None:
                raise self._disagreement(other, "backend_")
            return self._of(exact.merged(other_exact))

    @torch.no_grad()
    def scatter_along(self, directions_kd: Tensor) -> Tensor:
        """Return Σ (vᵀ(x - m))² over the rows seen, for every row v of `directions_kd`, (k,).

        With the backend "exact" it comes from the second moment, O(d² k); otherwise from the eigenpairs that are kept.
        """
        state = self._fitted()
        with unrounded(state.moments.shift_d.device):
            return state.scatter_along(directions_kd)

    # -- what was learned ---------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the components as they are now, precise enough to watch how they change.

        With the backend "exact" that is a single round of iteration that starts from the last snapshot, O(d² k), and
        not rounds until convergence; `components_` then starts from this one too. A second call before more rows are
        added costs nothing.
        """
        self._fitted()
        together(self.works(Task.SNAPSHOT))
        assert self._snapshot is not None
        return self._snapshot

    def transform(self, rows: Tensor) -> Tensor:
        """Return the coordinates of rows (n, d) along the components, (n, k), in the dtype of the rows."""
        mean_d, components_kd = self.mean_, self.components_
        centred_nd = rows - mean_d.to(rows) if self.center else rows
        return centred_nd @ components_kd.to(rows).T

    @property
    def is_fitted(self) -> bool:
        """Whether any row was seen."""
        return self._state is not None

    @property
    def components_(self) -> Tensor:
        """Orthonormal rows by descending variance, (k, d)."""
        return self._learned().components

    @property
    def singular_values_(self) -> Tensor:
        """Singular values of the centred rows, (k,)."""
        return self._learned().singular_values

    @property
    def captured_error_(self) -> float:
        """Estimate of what these components miss, as a share of what the best k would capture; NaN if unknown.

        Zero for the backend "exact", unless it began as a sketch. For "sketch" see
        `evatune.pca.sketch.SketchState.missed`; for "incremental" nothing is known.
        """
        return self._learned().captured_error

    @property
    def total_variance_(self) -> float:
        """Sum of the variances of all features."""
        if self._found is not None:
            return self._found.total_variance
        return float(self._fitted().moments.variance_d(center=self.center).sum())

    @property
    def mean_(self) -> Tensor:
        """Mean of the rows, (d,)."""
        moments = self._fitted().moments
        return moments.mean_d.to(moments.shift_d.dtype)

    @property
    def var_(self) -> Tensor:
        """Variance of each feature, (d,); about zero if `center` is false."""
        moments = self._fitted().moments
        return moments.variance_d(center=self.center).to(moments.shift_d.dtype)

    @property
    def n_samples_seen_(self) -> int:
        """How many rows were seen."""
        return self._fitted().moments.n_rows

    @property
    def n_features_in_(self) -> int:
        """How wide the rows are."""
        return self._fitted().n_features

    @property
    def n_components_(self) -> int:
        """How many components are kept, after clipping to the number of features."""
        return self._fitted().n_components

    @property
    def backend_(self) -> str:
        """The backend in use."""
        return self._fitted().name

    # -- exchange and saving ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def condensed(self) -> StreamingPCA:
        """Refresh, and return what processes exchange at the end.

        It is this object, with one exception: if "auto" has chosen "exact", leading eigenpairs replace the second
        moment where they take much less memory. There are more of them than components, so that merging loses little.
        """
        state = self.refresh()._fitted()
        if self.backend != AUTO:
            return self
        alone(check_finite(state.moments.squares_d))
        with unrounded(state.moments.shift_d.device):
            return self._of(state.condensed())

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of everything learned as a flat mapping of tensors, ready for safetensors."""
        state = self._fitted()
        return {name: tensor.detach().clone().contiguous() for name, tensor in state.tensors().items()} | {
            "kind": name_tensor(self.kind),
            "backend": name_tensor(state.name),
            "center": torch.tensor(self.center),
            "n_components": torch.tensor(self.n_components),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], *, device: torch.device | str | None = None) -> Self:
        """Continue from what `state_dict` returned, optionally on another device.

        Raises:
            EvaError: an entry is missing, or the state is of another backend or centring, or keeps fewer components,
                than this object asks for. Nothing is loaded then.
        """
        try:
            self._state = self._loaded(state, device)
        except KeyError as error:
            raise EvaError(f"this is not a state of StreamingPCA: {error.args[0]} missing.") from None
        self._forget()
        return self

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Return the object, with the backend "auto", that a `state_dict` describes."""
        return cls(int(state["n_components"]), center=bool(state["center"])).load_state_dict(state)

    def cost(self, *, n_features: int) -> Cost:
        """Return the memory that measuring rows of `n_features` features takes."""
        n_components = min(self.n_components, n_features)
        return choose_backend(self.backend, n_components, n_features).cost(n_components, n_features)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _disagreement(self, other: StreamingPCA, name: str) -> EvaError:
        mine, theirs = getattr(self, name), getattr(other, name)
        return EvaError(f"only equal settings merge, but {name} is {mine!r} here and {theirs!r} there.")

    def _wanted(self) -> Wanted:
        return Wanted(n_components=self.n_components, center=self.center, tolerance=self.tolerance, seed=self.seed)

    def _start(self, moments: Moments) -> State:
        n_features = len(moments.shift_d)
        if self.n_components > n_features:
            warnings.warn(
                f"n_components={self.n_components} is clipped to the {n_features} features of the rows.",
                EvaWarning,
                stacklevel=4,
            )
        state = choose_backend(self.backend, min(self.n_components, n_features), n_features)
        return state.start(self._wanted(), moments)

    def _loaded(self, saved: Mapping[str, Tensor], device: torch.device | str | None) -> State:
        """Return the state that `saved` describes, a copy of it."""
        kind, backend = read_name(saved["kind"]), read_name(saved["backend"])
        center, n_kept = bool(saved["center"]), int(saved["n_components"])
        if kind != self.kind:
            raise EvaError(f"this is not a state of StreamingPCA: its kind is {kind!r}.")
        if self.backend not in (AUTO, backend) and backend not in STATES[self.backend].turns_into:
            raise EvaError(
                f"the state is of backend {backend!r}, but this object was made with backend={self.backend!r}."
            )
        if center != self.center:
            raise EvaError(f"the state has center={center}, but this object was made with center={self.center}.")
        tensors = {name: tensor.clone() if device is None else tensor.to(device) for name, tensor in saved.items()}
        with unrounded(max(tensors.values(), key=Tensor.numel).device):  # counters may be elsewhere
            state = STATES[backend].from_tensors(tensors, self._wanted())
        if not state.keeps_all and state.n_components > n_kept:
            raise EvaError(f"the state keeps n_components={n_kept}, but this object asks for {self.n_components}.")
        return state

    def _of(self, state: State | None) -> Self:
        """Return an object with the same settings and this state."""
        result = type(self)(
            self.n_components,
            backend=self.backend,
            center=self.center,
            seed=self.seed,
            product_dtype=self.product_dtype,
            tolerance=self.tolerance,
        )
        result._state = state
        return result

    def _forget(self) -> None:
        """Forget what was found of the rows so far."""
        self._found = self._snapshot = None

    def _fitted(self) -> State:
        if self._state is None:
            raise NotFittedError("this StreamingPCA has seen no rows yet; call partial_fit first.")
        return self._state

    def _learned(self) -> _Found:
        self._fitted()
        together(self.works(Task.LEARN))
        assert self._found is not None
        return self._found

    def _settle(self) -> Steps[None]:
        self._state = yield from self._fitted().settle()
        self._forget()

    def _refresh(self) -> Steps[None]:
        yield from self._fitted().refresh()
        self._forget()

    def _take_snapshot(self) -> Steps[None]:
        components_kd, singular_values_k = yield from self._factorized(rough=True)
        *values, total_variance = yield from self._read(singular_values_k)
        self._snapshot = Snapshot(
            components=own(components_kd),
            singular_values=torch.tensor(values, dtype=singular_values_k.dtype, device="cpu"),
            total_variance=total_variance,
            n_samples_seen=self.n_samples_seen_,
        )

    def _learn(self) -> Steps[None]:
        components_kd, singular_values_k = yield from self._factorized(rough=False)
        error = missed = yield from self._fitted().missed()
        captured, total_variance = yield from self._read(singular_values_k.square().sum(dim=0, keepdim=True))
        if missed > 0:  # not NaN
            error = min(missed / captured, 1.0) if captured > 0 else 0.0
        self._found = _Found(own(components_kd), own(singular_values_k), total_variance, error)

    def _read(self, numbers_k: Tensor) -> Steps[list[float]]:
        """Return numbers, (k,), and the total variance after them."""
        moments = self._fitted().moments
        sums = (moments.sum_d, moments.squares_d)
        (found,) = yield batched(with_total_variance, numbers_k, *sums, **moments.facts, center=self.center)
        return (yield Host(found))

    def _factorized(self, *, rough: bool) -> Steps[tuple[Tensor, Tensor]]:
        """Return the components (k, d) and singular values (k,)."""
        state = self._fitted()
        yield from check_finite(state.moments.squares_d)
        k, like_d = state.n_components, state.moments.shift_d
        vectors_dp, values_p = yield from state.eigenpairs(k, rough=rough)
        # If the rows span fewer directions than asked for, the rest are orthonormal vectors with singular value zero.
        n_known = min(k, len(values_p))
        basis_dk = complete_basis(vectors_dp[:, :n_known], k, seed=self.seed)
        values_k = values_p[:k] if n_known == k else pad(values_p, (0, k - n_known))
        components_kd, singular_values_k = yield batched(signed_components, basis_dk, values_k, dtype=like_d.dtype)
        return components_kd.to(like_d), singular_values_k.to(like_d)
