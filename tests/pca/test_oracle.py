"""Every backend against rows whose components are known, and against scikit-learn in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from evatune import StreamingPCA

SEEDS = [0, 1, 12345]
BACKENDS = ["exact", "sketch", "incremental", "auto"]
N_ROWS, N_FEATURES, K = 600, 160, 8
FALLING = 0.7 ** np.arange(N_FEATURES)
"""Every component has a gap of a factor 2 in variance to the next one."""


def cosines(first, second):
    return (first.double() * second.double()).sum(dim=1).abs()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_batch_gives_the_known_components(known_rows, stream, backend, seed):
    known = known_rows(N_ROWS, FALLING, mean=3.0, seed=seed)
    pca = stream([known.rows], K, backend=backend, seed=seed)
    assert (cosines(pca.components_, known.components[:K]) > 1 - 1e-6).all()
    torch.testing.assert_close(pca.explained_variance_, known.variances[:K], rtol=1e-4, atol=0)
    torch.testing.assert_close(pca.mean_, known.mean, rtol=0, atol=1e-10)
    assert pca.n_samples_seen_ == N_ROWS
    assert pca.total_variance_ == pytest.approx(float(known.variances.sum()), rel=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("backend", "tolerance"), [("exact", 1e-9), ("sketch", 1e-4), ("incremental", 2e-2)])
def test_many_batches_agree_with_scikit_learn(known_rows, stream, backend, tolerance, seed):
    """The exact backend to rounding; the sketch and Algorithm 2 forget what they truncate, so within `tolerance`."""
    known = known_rows(N_ROWS, FALLING, mean=3.0, seed=seed)
    reference = PCA(K, svd_solver="full").fit(known.rows.numpy())
    pca = stream(known.batches(64), K, backend=backend, seed=seed)
    sigma = torch.tensor(reference.singular_values_)
    torch.testing.assert_close(pca.singular_values_, sigma, rtol=tolerance, atol=0)
    torch.testing.assert_close(
        pca.explained_variance_, torch.tensor(reference.explained_variance_), rtol=2 * tolerance, atol=0
    )
    torch.testing.assert_close(
        pca.explained_variance_ratio_, torch.tensor(reference.explained_variance_ratio_), rtol=2 * tolerance, atol=0
    )
    assert (cosines(pca.components_, torch.tensor(reference.components_)) > 1 - tolerance).all()
    # Mean and variance are sums: no backend loses any of them.
    torch.testing.assert_close(pca.mean_, torch.tensor(reference.mean_), rtol=0, atol=1e-10)
    torch.testing.assert_close(pca.var_, torch.tensor(known.rows.numpy().var(axis=0, ddof=1)), rtol=1e-9, atol=0)
    assert pca.n_samples_seen_ == reference.n_samples_ == N_ROWS


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_transform_is_that_of_scikit_learn_up_to_signs(known_rows, stream, backend):
    known = known_rows(N_ROWS, FALLING, mean=3.0, seed=0)
    reference = PCA(K, svd_solver="full").fit(known.rows.numpy())
    ours = stream([known.rows], K, backend=backend).transform(known.rows[:50])
    theirs = torch.tensor(reference.transform(known.rows[:50].numpy()))
    assert ours.shape == (50, K) and ours.dtype == torch.float64
    torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_components_are_orthonormal_and_in_falling_order(known_rows, stream, backend):
    known = known_rows(N_ROWS, FALLING, seed=0)
    pca = stream(known.batches(64), K, backend=backend)
    torch.testing.assert_close(pca.components_ @ pca.components_.T, torch.eye(K).double(), rtol=0, atol=1e-9)
    assert (pca.singular_values_.diff() <= 0).all()
    assert (pca.explained_variance_ratio_ >= 0).all() and pca.explained_variance_ratio_.sum() <= 1 + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_every_float_dtype_gives_the_components_of_the_rows_as_they_arrive(
    known_rows, stream, oracle, backend, dtype, seed
):
    """The oracle sees the rounded rows, so that our arithmetic is compared and not the rounding of the input."""
    known = known_rows(N_ROWS, FALLING, mean=0.5, seed=seed)
    rounded = [batch.to(dtype) for batch in known.batches(100)]
    truth = oracle(torch.cat(rounded))
    pca = stream(rounded, K, backend=backend)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert pca.components_.dtype == pca.singular_values_.dtype == pca.mean_.dtype == pca.var_.dtype == kept
    least = {"exact": 1 - 1e-5, "sketch": 0.9999, "incremental": 0.99}[backend]
    assert truth.captured_by(pca.components_, K // 2) > least
    assert (cosines(pca.components_, truth.components[:K])[: K // 2] > least).all()
    torch.testing.assert_close(pca.mean_.double(), truth.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pca.var_.double(), truth.variance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("backend", "decay", "least"),
    [("exact", 0.25, 1 - 1e-9), ("sketch", 0.25, 0.9998), ("sketch", 0.5, 0.9999), ("sketch", 1.0, 0.99999)],
)
def test_a_slowly_decaying_spectrum_is_captured(known_rows, stream, oracle, backend, decay, least, seed):
    """σᵢ ∝ i^-decay: what the first half of the components captures, as a share of the optimum."""
    known = known_rows(N_ROWS * 2, np.arange(1, N_FEATURES + 1) ** -decay, seed=seed)
    truth = oracle(known.rows)
    pca = stream(known.batches(150), 2 * K, backend=backend, seed=seed)
    assert truth.captured_by(pca.components_, K) > least


def test_the_test_matrix_that_follows_the_data_is_what_captures_a_slow_decay(known_rows, oracle):
    """A random one of the same width, as a plain Nyström sketch has, stays far below the bar of the test above."""
    known = known_rows(N_ROWS * 2, np.arange(1, N_FEATURES + 1) ** -0.25, seed=0)
    truth = oracle(known.rows)
    random = torch.randn(N_FEATURES, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = known.rows - known.mean
    sketch = centred.T @ (centred @ random)
    factor = sketch @ torch.linalg.inv(torch.linalg.cholesky(random.T @ sketch)).T
    leading = torch.linalg.svd(factor, full_matrices=False).U[:, :K].T
    assert truth.captured_by(leading, K) < 0.95


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_one_massive_direction_does_not_hide_the_others(known_rows, stream, oracle, backend, dtype, seed):
    """One direction owns 10⁶ times the variance of the next, as massive activations do."""
    spectrum = np.concatenate([[1e3], 0.8 ** np.arange(N_FEATURES - 1)])
    known = known_rows(N_ROWS, spectrum, seed=seed)
    batches = [batch.to(dtype) for batch in known.batches(100)]
    truth = oracle(torch.cat(batches))
    pca = stream(batches, K, backend=backend, seed=seed)
    assert cosines(pca.components_[:1], truth.components[:1]) > 1 - 1e-6
    rest = (pca.components_[1 : K // 2].double() @ truth.components[1:].T).square() @ truth.eigenvalues[1:]
    least = 0.9999 if dtype == torch.float64 and backend != "incremental" else 0.98
    assert float(rest.sum() / truth.eigenvalues[1 : K // 2].sum()) > least


@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_uncentred_components_are_those_of_the_second_moment(known_rows, stream, oracle, backend):
    known = known_rows(N_ROWS, FALLING, mean=2.0, seed=0)
    truth = oracle(known.rows, center=False)
    pca = stream(known.batches(100), K, backend=backend, center=False)
    assert cosines(pca.components_[:1], truth.components[:1]) > 1 - 1e-9
    assert truth.captured_by(pca.components_, K) > (0.9999 if backend != "incremental" else 0.999)
    torch.testing.assert_close(pca.var_, truth.variance, rtol=1e-9, atol=0)
    torch.testing.assert_close(pca.mean_, truth.mean, rtol=0, atol=1e-10)
    assert pca.total_variance_ == pytest.approx(float(truth.variance.sum()), rel=1e-10)
    torch.testing.assert_close(pca.transform(known.rows[:5]), known.rows[:5] @ pca.components_.T, rtol=0, atol=1e-12)


def test_centring_matters_where_means_are_large(known_rows, stream):
    known = known_rows(N_ROWS, FALLING, mean=50.0, seed=0)
    centred = stream([known.rows], 1, backend="exact").components_
    uncentred = stream([known.rows], 1, backend="exact", center=False).components_
    direction = known.mean / known.mean.norm()
    assert float((uncentred @ direction).abs()) > 0.999 > 0.5 > float((centred @ direction).abs())


def test_auto_takes_the_exact_backend_for_narrow_rows_and_the_sketch_for_wide_ones():
    assert StreamingPCA(4).partial_fit(torch.randn(10, 100)).backend_ == "exact"
    assert StreamingPCA(4).partial_fit(torch.randn(10, 3000)).backend_ == "sketch"
    assert StreamingPCA(4, backend="incremental").partial_fit(torch.randn(10, 3000)).backend_ == "incremental"


@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
@pytest.mark.parametrize("center", [True, False])
def test_scatter_along_any_direction_is_that_of_the_rows(known_rows, stream, backend, center):
    """Sketches and the incremental backend know it within the span of what they keep, here all that varies."""
    known = known_rows(300, 0.5 ** np.arange(12), mean=3.0, seed=4)
    pca = stream(known.batches(50), 12, backend=backend, center=center)
    directions = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double()
    expected = ((known.rows - center * known.rows.mean(dim=0)) @ directions.T).square().sum(dim=0)
    torch.testing.assert_close(pca.scatter_along(directions), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_autocast_around_it_rounds_nothing(known_rows, backend):
    known = known_rows(600, np.arange(1, 301) ** -0.3, mean=3.0, seed=4)  # nothing massive, which float64 would see to
    rows, others = known.rows.float().chunk(2)

    def learned():
        pca = StreamingPCA(4, backend=backend, product_dtype=torch.float32).partial_fit(rows)
        merged = pca.merge(StreamingPCA(4, backend=backend, product_dtype=torch.float32).partial_fit(others))
        spectra = [part.refresh().components_ for part in (pca, merged)]
        return [*spectra, merged.singular_values_, pca.scatter_along(rows[:3])]

    outside = learned()
    with torch.autocast("cpu", torch.bfloat16):
        inside = learned()
    for found, expected in zip(inside, outside, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
