"""Eigenpairs from a thin sketch, in float32 as in float64."""

from __future__ import annotations

import pytest
import torch

from evatune.pca import nystrom
from evatune.pca.nystrom import nystrom_eigenpairs
from evatune.pca.together import alone

D, WIDTH, K = 500, 80, 16
HARMONIC = 1 / torch.arange(1, D + 1).double()


def eigenpairs(test, sketch):
    return alone(nystrom_eigenpairs(test, sketch))


def matrix_with(eigenvalues, *, seed=0):
    """Return a symmetric matrix and its eigenvectors in columns."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(D, D, generator=generator).double()).Q
    return (axes * eigenvalues) @ axes.T, axes


def followed(axes, *, seed=0):
    """Return a test matrix like those of a streaming sketch: near the leading eigenvectors, rounded to bfloat16."""
    noise = torch.randn(D, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
    return (axes[:, :WIDTH] + 1e-2 * noise / D**0.5).to(torch.bfloat16).double()


def orthonormal_to(vectors):
    gram = vectors.double().T @ vectors.double()
    return float((gram - torch.eye(len(gram))).abs().max())


def massive(*eigenvalues):
    return torch.cat([torch.tensor(eigenvalues).double(), HARMONIC[: D - len(eigenvalues)]])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rank", [1, 30, 60])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_matrix_of_low_rank_is_found_whole(dtype, bar, rank, seed):
    values = torch.zeros(D).double()
    values[:rank] = HARMONIC[:rank]
    matrix, axes = matrix_with(values, seed=seed)
    for test in (followed(axes, seed=seed), torch.randn(D, WIDTH, generator=torch.Generator().manual_seed(seed))):
        vectors, found = eigenpairs(test.to(dtype), (matrix @ test.double()).to(dtype))
        assert vectors.dtype == found.dtype == dtype
        assert vectors.shape == (D, rank) and found.shape == (rank,), "what has no variance has no direction"
        assert orthonormal_to(vectors) < bar
        torch.testing.assert_close(found.double(), values[:rank], rtol=bar, atol=0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("values", "bar"),
    [
        (HARMONIC, 1e-6),
        (HARMONIC.square(), 1e-5),
        (massive(1e3), 1e-5),
        (massive(1e6, 1e4), 1e-4),
        (massive(1e7, 1e3), 1e-3),
    ],
    ids=["harmonic", "square", "massive", "massive-6", "massive-7"],
)
def test_float32_finds_what_float64_does(values, bar, seed):
    """Whatever the largest eigenvalue is, the others keep their digits as far as the sketch itself has them."""
    matrix, axes = matrix_with(values, seed=seed)
    test = followed(axes, seed=seed)
    vectors, found = eigenpairs(test.float(), (matrix @ test).float())
    expected = eigenpairs(test, matrix @ test)[1]
    torch.testing.assert_close(found[:K].double(), expected[:K], rtol=bar, atol=0)
    assert orthonormal_to(vectors) < 1e-5
    captured = torch.linalg.vecdot(vectors.double(), matrix @ vectors.double(), dim=0)
    torch.testing.assert_close(captured[2:K], values[2:K], rtol=1e-3, atol=0)


def test_variances_far_apart_are_multiplied_in_float64(monkeypatch):
    matrix, axes = matrix_with(massive(1e8, 1e3))
    test = followed(axes)
    sketch, expected = (matrix @ test).float(), eigenpairs(test, matrix @ test)[1]

    def error():
        return float((eigenpairs(test.float(), sketch)[1][:K].double() / expected[:K] - 1).abs().max())

    usual = error()
    monkeypatch.setattr(nystrom, "SPREAD", float("inf"))
    assert 3 * usual < error()


@pytest.mark.parametrize("n_repeated", [1, 2, 3, 20])
@pytest.mark.parametrize("values", [HARMONIC, massive(3e3, 1e2)], ids=["harmonic", "massive"])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_columns_that_repeat_others_do_no_harm(dtype, bar, values, n_repeated):
    matrix, axes = matrix_with(values)
    test = followed(axes)
    repeated = torch.cat([test, test[:, :n_repeated] + test[:, 20 : 20 + n_repeated]], dim=1)
    expected = eigenpairs(test, matrix @ test)[1]
    vectors, found = eigenpairs(repeated.to(dtype), (matrix @ repeated).to(dtype))
    assert len(found) == WIDTH and orthonormal_to(vectors) < bar
    torch.testing.assert_close(found.double(), expected, rtol=bar, atol=0)


def test_what_is_singular_but_for_rounding_is_cut_off():
    near = 1.0 - 1e-9
    core = torch.tensor([[1.0, near, 0.0], [near, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    root = alone(nystrom._inverse_root(core, cutoff=1e-6))
    assert root.shape == (3, 2)
    torch.testing.assert_close(root @ root.T, torch.linalg.pinv(core, hermitian=True, rtol=1e-6))
    assert root[2, 0] == 0, "the first column is made of the first two"


def test_a_matrix_of_zeros_has_no_eigenpairs():
    vectors, values = eigenpairs(torch.randn(D, WIDTH), torch.zeros(D, WIDTH))
    assert vectors.shape == (D, 0) and values.shape == (0,)
