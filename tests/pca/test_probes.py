"""What a sketch misses, from its probes, against the residuals themselves."""

from __future__ import annotations

import pytest
import torch

from evatune.pca import probes

D, K, WIDTH = 60, 4, 20
SIZES = {"n_components": K, "n_features": D, "width": WIDTH}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearly_eigenpairs(*, seed=0, n_probes=4000):
    """Return a matrix, its leading eigenvectors turned a little, their eigenvalues, probes and images."""
    axes = torch.linalg.qr(drawn(D, D, seed=seed)).Q
    matrix = (axes / torch.arange(1, D + 1, dtype=torch.float64)) @ axes.T
    vectors = torch.linalg.qr(axes[:, :WIDTH] + 0.02 * drawn(D, WIDTH, seed=seed + 1)).Q
    values = (vectors * (matrix @ vectors)).sum(dim=0)
    random = drawn(D, n_probes, seed=seed + 2)
    return matrix, vectors, values, random, matrix @ random


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_missed_variance_is_that_of_the_residuals(seed):
    matrix, vectors, values, random, images = nearly_eigenpairs(seed=seed)
    (found,) = probes.missed_by(vectors[:, :K], values[:K], values[-1:], random, images)
    residuals = torch.linalg.vector_norm(matrix @ vectors[:, :K] - vectors[:, :K] * values[:K], dim=0)
    expected = residuals.square() / torch.maximum(values[:K] - values[-1], residuals)
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0)


def test_a_stack_is_answered_as_each_alone():
    of_each = [nearly_eigenpairs(seed=seed, n_probes=8)[1:] for seed in range(3)]
    given = [(vectors[:, :K], values[:K], values[-1:], *rest) for vectors, values, *rest in of_each]
    (missed,) = probes.missed_by(*map(torch.stack, zip(*given, strict=True)))
    (judged,) = probes.judged(torch.stack([values for _, values, *_ in of_each]), missed, **SIZES)
    assert (missed.shape, judged.shape) == ((3, K), (3, 2))
    for number, tensors in enumerate(given):
        (alone,) = probes.missed_by(*tensors)
        torch.testing.assert_close(missed[number], alone, rtol=1e-12, atol=0)
        torch.testing.assert_close(judged[number], probes.judged(of_each[number][1], alone, **SIZES)[0])


def test_the_first_half_of_the_components_may_miss_a_tenth():
    values = torch.ones(K)
    assert float(probes.worst_share(torch.tensor([0.0, 0.0, 0.2, 0.2]), values)) == pytest.approx(0.1)
    assert float(probes.worst_share(torch.tensor([0.2, 0.2, 0.0, 0.0]), values)) == pytest.approx(10 * 0.2)
    assert float(probes.worst_share(torch.tensor([0.3]), torch.tensor([1.0]))) == pytest.approx(10 * 0.3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.ones(WIDTH), 0.0),
        (torch.ones(WIDTH - 1), 1.0),  # the last column sees nothing but rounding
        (torch.cat([torch.tensor([100.0]), torch.ones(WIDTH - 1)]), 1.0),
        (torch.cat([torch.tensor([20.0]), torch.ones(WIDTH - 1)]), 0.0),
        (torch.cat([torch.full((K,), 2e5), torch.ones(WIDTH - K)]), 1.0),
        (torch.cat([torch.full((K,), 5e4), torch.ones(WIDTH - K)]), 0.0),
    ],
)
def test_rounding_hides_small_directions_beside_massive_ones(values, expected):
    assert float(probes.is_massive(values, **SIZES)) == expected
    (judged,) = probes.judged(values, **SIZES)
    assert judged.tolist() == [0.0, expected]
