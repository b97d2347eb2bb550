"""Leading eigenpairs against the full eigendecomposition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from evatune.pca import eigen
from evatune.pca.eigen import leading_eigenpairs, missed_variance
from evatune.pca.together import alone

D, K = 400, 12


def matrix_with(eigenvalues, *, seed=0):
    """Return a symmetric matrix and its eigenvectors in columns."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double()).Q
    return (axes * eigenvalues) @ axes.T, axes


def leading(*args, **options):
    return alone(leading_eigenpairs(*args, **options))


def harmonic(power):
    return torch.arange(1, D + 1).double() ** -power


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "tolerance", "bar"), [(torch.float64, 1e-16, 1e-9), (torch.float32, 1e-5, 3e-4)])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_leading_pairs_are_those_of_the_whole_decomposition(power, dtype, tolerance, bar, seed):
    values = harmonic(power)
    matrix, axes = matrix_with(values, seed=seed)
    vectors, found = leading(matrix.to(dtype), K, tolerance=tolerance)
    assert vectors.shape[0] == D and vectors.shape[1] == len(found) >= K
    torch.testing.assert_close(found[:K].double(), values[:K], rtol=bar, atol=0)
    cosines = (vectors[:, :K].double() * axes[:, :K]).sum(dim=0).abs()
    assert (cosines > 1 - 10 * bar).all()
    gram = vectors.double().T @ vectors.double()
    torch.testing.assert_close(gram, torch.eye(len(found)).double(), rtol=0, atol=1e-5)


def test_iteration_starts_from_columns_that_are_nearly_right(monkeypatch):
    """From the eigenvectors of a matrix that hardly differs, no filtering is needed, and much from random columns."""
    matrix, _ = matrix_with(harmonic(1.0))
    rounds = []
    one_round = eigen._filtered
    monkeypatch.setattr(eigen, "_filtered", lambda *args: rounds.append(1) or one_round(*args))
    near, _ = leading(matrix, K, tolerance=1e-12)
    assert len(rounds) > 2
    rounds.clear()
    leading(matrix + 1e-4 * torch.eye(D).double(), K, tolerance=1e-12, near_dl=near)
    assert not rounds


def test_one_rough_round_comes_closer_but_is_not_there():
    matrix, axes = matrix_with(harmonic(1.0))
    near = torch.linalg.qr(axes[:, : K + 16] + 0.02 * torch.randn(D, K + 16).double()).Q
    rough, _ = leading(matrix, K, tolerance=1e-24, near_dl=near, n_rounds=1)
    thorough, _ = leading(matrix, K, tolerance=1e-24, near_dl=near)

    def missed(vectors):
        return 1 - float((vectors[:, :K].T @ axes[:, :K]).square().sum()) / K

    assert missed(near) > 10 * missed(rough) > 100 * missed(thorough)


def test_a_spectrum_that_does_not_fall_is_factorized_in_full():
    matrix, _ = matrix_with(torch.ones(D).double() + 1e-6 * harmonic(1.0))
    vectors, values = leading(matrix, K, tolerance=1e-24)
    assert vectors.shape == (D, D)
    torch.testing.assert_close(matrix @ vectors, vectors * values, rtol=0, atol=1e-12)


def test_a_matrix_of_small_rank_has_no_more_pairs():
    matrix, _ = matrix_with(torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(D - 3)]).double())
    vectors, values = leading(matrix, K, tolerance=1e-16)
    assert vectors.shape == (D, 3)
    torch.testing.assert_close(values, torch.tensor([3.0, 2.0, 1.0]).double(), rtol=1e-10, atol=0)
    assert leading(torch.zeros(D, D), K, tolerance=1e-5)[0].shape == (D, 0)


@pytest.mark.parametrize("ratio", [0.5, 0.8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-16), (torch.float32, 1e-5)])
def test_eigenvalues_that_fall_below_rounding_do_no_harm(ratio, dtype, tolerance):
    values = ratio ** torch.arange(D).double()
    matrix, axes = matrix_with(values)
    vectors, found = leading(matrix.to(dtype), K, tolerance=tolerance)
    torch.testing.assert_close(found[:K].double(), values[:K], rtol=1e-3, atol=0)
    assert ((vectors[:, :K].double() * axes[:, :K]).sum(dim=0).abs() > 1 - 1e-4).all()


def test_one_massive_eigenvalue_leaves_the_others_right_in_float64():
    values = torch.cat([torch.tensor([1e7]).double(), harmonic(1.0)[:-1]])
    matrix, axes = matrix_with(values)
    vectors, found = leading(matrix, K, tolerance=1e-12)
    torch.testing.assert_close(found[:K], values[:K], rtol=1e-6, atol=0)
    assert ((vectors[:, :K] * axes[:, :K]).sum(dim=0).abs() > 1 - 1e-8).all()


def test_an_eigenvector_that_stands_apart_is_met_to_an_angle():
    """Of the 12 wanted, one is turned so little that the variance missed is well below the tolerance in the mean."""
    values = torch.cat([torch.tensor([1.0, 0.95]).double(), 0.5 * harmonic(0.02)[:-2]])
    matrix, axes = matrix_with(values)
    turned = axes.clone()
    angle = 0.05
    turned[:, 0] = axes[:, 0] * (1 - angle**2) ** 0.5 + axes[:, 100] * angle
    near = turned[:, : K + 16]
    missed = angle**2 * (values[0] - values[100]) / values[:K].sum()
    tolerance = 4e-4
    assert missed < tolerance, "the mean alone would be content"
    vectors, _ = leading(matrix, K, tolerance=tolerance, near_dl=near)
    cosine = float((vectors[:, 0] @ axes[:, 0]).abs())
    assert cosine > 1 - (eigen.ANGLE**2 * tolerance * 0.05**2) > 1 - angle**2 / 2


@pytest.mark.parametrize("angle", [1e-3, 0.1, 0.5])
def test_what_a_turned_eigenvector_misses_is_known_in_the_plane(angle):
    largest, other = 3.0, 1.0
    vector = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    image = vector * torch.tensor([largest, other], dtype=torch.float64)
    value = vector @ image
    residual = torch.linalg.vector_norm(image - value * vector)
    missed = missed_variance(residual[None], value[None], torch.tensor(other, dtype=torch.float64))
    assert float(missed) == pytest.approx(float(largest - value), rel=1e-9)


def test_matrices_of_one_width_start_from_the_same_columns():
    eigen._random_columns.cache_clear()
    for seed in (0, 1):
        leading(matrix_with(harmonic(1.0), seed=seed)[0], K, tolerance=1e-12)
    assert eigen._random_columns.cache_info().misses == 1, "drawing them takes as long as a round of iteration"
