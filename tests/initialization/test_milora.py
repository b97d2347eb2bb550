from __future__ import annotations

import pytest
import torch

from evatune.errors import EvaError
from evatune.initialization import milora


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(10, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_the_product_is_the_minor_part_and_the_rest_the_principal_part(weight, scaling):
    A, B = milora(weight, 3, scaling=scaling)
    assert A.shape == (3, 14)
    assert B.shape == (10, 3)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(scaling * B @ A, U[:, -3:] * S[-3:] @ Vh[-3:])
    torch.testing.assert_close(weight - scaling * B @ A, U[:, :-3] * S[:-3] @ Vh[:-3])


def test_both_sides_take_the_root_of_the_singular_values(weight):
    A, B = milora(weight, 3)
    roots = torch.linalg.svdvals(weight)[-3:]
    torch.testing.assert_close(A @ A.T, torch.diag(roots))
    torch.testing.assert_close(B.T @ B, torch.diag(roots))


def test_half_precision_is_decomposed_in_single(weight):
    A, B = milora(weight.bfloat16(), 2)
    assert A.dtype == B.dtype == torch.float32


@pytest.mark.parametrize("rank", [0, 11])
def test_a_rank_out_of_range_is_refused(weight, rank):
    with pytest.raises(EvaError, match=f"rank {rank} is out of range: a weight of 10 x 14 has 10 singular values"):
        milora(weight, rank)
