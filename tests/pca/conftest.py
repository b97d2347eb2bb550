"""One builder of rows whose principal components are known exactly, and two independent oracles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KnownRows:
    """Rows whose sample mean and sample covariance are the ones asked for, not only in expectation."""

    rows: Tensor
    """(n, d), float64."""
    components: Tensor
    """Eigenvectors of the sample covariance in rows, (d, d)."""
    deviations: Tensor
    """Square roots of its eigenvalues, descending, (d,)."""
    mean: Tensor
    """Sample mean, (d,)."""

    @property
    def variances(self) -> Tensor:
        return self.deviations.square()

    def batches(self, *sizes: int) -> list[Tensor]:
        """Cut into batches of these sizes; the last size is repeated until all rows are used."""
        cut, start = [], 0
        while start < len(self.rows):
            size = sizes[min(len(cut), len(sizes) - 1)]
            cut.append(self.rows[start : start + size])
            start += size
        return cut


def _orthonormal(n: int, d: int, rng: np.random.Generator, against: np.ndarray | None = None) -> np.ndarray:
    raw = rng.standard_normal((n, d))
    for _ in range(2):
        if against is not None:
            raw -= against[:, None] * (against @ raw)
        raw, _ = np.linalg.qr(raw)
    return raw


@pytest.fixture(scope="session")
def known_rows() -> Callable[..., KnownRows]:
    """Build rows with a given spectrum of deviations (one per feature, zeros allowed), mean size and seed."""

    def build(n_rows: int, deviations: Sequence[float], *, mean: float = 1.0, seed: int = 0) -> KnownRows:
        rng = np.random.default_rng(seed)
        spectrum = np.sort(np.asarray(deviations, dtype=np.float64))[::-1].copy()
        n_features = len(spectrum)
        axes = _orthonormal(n_features, n_features, rng)
        center = mean * rng.standard_normal(n_features)
        n_varying = min(n_features, n_rows - 1)
        assert not spectrum[n_varying:].any(), "more varying directions than rows can have"
        # Orthogonal to the vector of ones, so that the sample mean is exactly `center`.
        scores = _orthonormal(n_rows, n_varying, rng, against=np.full(n_rows, n_rows**-0.5))
        rows = (n_rows - 1) ** 0.5 * (scores * spectrum[:n_varying]) @ axes[:n_varying] + center
        return KnownRows(
            rows=torch.tensor(rows),
            components=torch.tensor(axes),
            deviations=torch.tensor(spectrum),
            mean=torch.tensor(center),
        )

    return build


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Principal components by the eigendecomposition of the covariance in float64 NumPy."""

    mean: Tensor
    variance: Tensor
    eigenvalues: Tensor
    components: Tensor

    def captured_by(self, components: Tensor, k: int) -> float:
        """Return what the first k given components capture, as a share of what k components can capture at best."""
        kept = components[:k].double()
        covariance = self.components.T * self.eigenvalues @ self.components
        return float((kept @ covariance * kept).sum() / self.eigenvalues[:k].sum())


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Oracle]:
    """Decompose rows in float64, about their mean or (center=False) about zero; n - 1 in the denominator."""

    def decompose(rows: Tensor, *, center: bool = True) -> Oracle:
        x = rows.double().numpy()
        mean = x.mean(axis=0)
        centred = x - mean if center else x
        covariance = centred.T @ centred / max(len(x) - 1, 1)
        values, vectors = np.linalg.eigh(covariance)
        return Oracle(
            mean=torch.tensor(mean),
            variance=torch.tensor(np.diag(covariance).copy()),
            eigenvalues=torch.tensor(values[::-1].copy()).clamp_min(0),
            components=torch.tensor(vectors[:, ::-1].T.copy()),
        )

    return decompose


@pytest.fixture(scope="session")
def stream() -> Callable[..., object]:
    """Feed batches to a new StreamingPCA."""
    from evatune import StreamingPCA

    def run(batches: Sequence[Tensor], n_components: int, **settings: object) -> StreamingPCA:
        pca = StreamingPCA(n_components, **settings)
        for batch in batches:
            pca.partial_fit(batch)
        return pca

    return run
