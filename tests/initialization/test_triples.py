from __future__ import annotations

import pytest
import torch

from evatune.initialization.triples import singular_triples


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (9, 9)])
@pytest.mark.parametrize("smallest", [False, True])
def test_triples_are_those_of_the_decomposition(shape, smallest):
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = X * torch.logspace(0, -3, shape[1], dtype=torch.float64)
    U, S, Vh = singular_triples(X, 3, smallest=smallest)
    part = slice(-3, None) if smallest else slice(3)
    expected = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close(S, expected[1][part], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        U * S @ Vh, expected[0][:, part] * expected[1][part] @ expected[2][part], rtol=1e-5, atol=1e-9
    )
    for vectors in (U.T @ U, Vh @ Vh.T):
        torch.testing.assert_close(vectors, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_rank_deficient_matrix_gives_zeros_and_no_nan():
    X = torch.outer(torch.arange(5.0), torch.ones(4))
    U, S, Vh = singular_triples(X, 2, smallest=True)
    assert S.max() < 1e-6
    assert torch.isfinite(U).all()
    assert torch.isfinite(Vh).all()
    assert not singular_triples(torch.zeros(5, 4), 2)[0].any()
