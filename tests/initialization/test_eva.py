from __future__ import annotations

import pytest
import torch

from evatune.errors import EvaError
from evatune.initialization import eva


@pytest.fixture
def components() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)))[0].T.contiguous()


@pytest.fixture
def singular_values() -> torch.Tensor:
    return torch.tensor([9.0, 4.0, 3.0, 2.0, 1.0, 0.25])


@pytest.mark.parametrize("rank", [0, 1, 4, 6])
def test_rows_are_the_leading_components(components, rank):
    A = eva(components, rank)
    assert A.shape == (rank, 12)
    assert torch.equal(A, components[:rank])


def test_whitening_divides_each_row_by_the_root_of_its_singular_value(components, singular_values):
    A = eva(components, 4, singular_values=singular_values, whiten=True)
    expected = torch.tensor([1 / 3, 1 / 2, 1 / 3**0.5, 1 / 2**0.5])
    torch.testing.assert_close(A.norm(dim=1), expected)
    torch.testing.assert_close(A / A.norm(dim=1, keepdim=True), components[:4])


def test_whitening_does_not_compound_over_shared_inputs(components, singular_values):
    before = components.clone()
    first, second = (eva(components, 4, singular_values=singular_values, whiten=True) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(components, before)


@pytest.mark.parametrize("whiten", [False, True])
def test_each_target_owns_its_rows(components, singular_values, whiten):
    before = components.clone()
    eva(components, 4, singular_values=singular_values, whiten=whiten).zero_()
    assert torch.equal(components, before)


def test_rows_are_contiguous_whatever_the_components_are():
    # Matrix products round differently over other strides, and a reloaded adapter would differ from the saved one.
    assert eva(torch.eye(6).T.flip(0).T[:4], 3).is_contiguous()
    assert eva(torch.randn(12, 4).T, 3).is_contiguous()


def test_directions_without_variance_keep_length_one_when_whitened(components):
    A = eva(components, 6, singular_values=torch.tensor([4.0, 1.0, 0.25, 1e-9, 0.0, 0.0]), whiten=True)
    torch.testing.assert_close(A.norm(dim=1), torch.tensor([0.5, 1.0, 2.0, 1.0, 1.0, 1.0]))


def test_an_input_that_never_varies_gives_finite_rows(components):
    A = eva(components, 6, singular_values=torch.zeros(6), whiten=True)
    assert torch.equal(A, components)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(components, singular_values, dtype):
    assert eva(components.to(dtype), 3, singular_values=singular_values, whiten=True).dtype == dtype


@pytest.mark.parametrize("rank", [-1, 7])
def test_a_rank_out_of_range_is_refused(components, rank):
    with pytest.raises(EvaError, match=f"rank {rank} is out of range: 6 components of 12 features"):
        eva(components, rank)


@pytest.mark.parametrize(("values", "received"), [(None, "none"), (torch.ones(3), r"shape \(3,\)")])
def test_whitening_without_all_singular_values_is_refused(components, values, received):
    with pytest.raises(EvaError, match=f"one singular value for each of the 6 components, got {received}"):
        eva(components, 3, singular_values=values, whiten=True)
