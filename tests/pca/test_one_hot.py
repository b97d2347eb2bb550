"""Components of one-hot rows from counts, against the eigendecomposition of the rows themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evatune import EvaError
from evatune.pca.one_hot import OneHotPCA


def oracle(tokens: torch.Tensor, n_features: int, *, center: bool):
    rows = torch.nn.functional.one_hot(tokens, n_features).double()
    centred = rows - rows.mean(dim=0) if center else rows
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    return values.flip(0).clamp_min(0), vectors.flip(1), centred


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 8), min_size=2, max_size=60), center=st.booleans(), k=st.integers(1, 9))
def test_eigenpairs_are_those_of_the_rows(tokens, center, k):
    tokens = torch.tensor(tokens)
    values, _, centred = oracle(tokens, 9, center=center)
    pca = OneHotPCA(k, n_features=9, center=center).partial_fit(tokens)
    components = pca.components_.double()
    torch.testing.assert_close(pca.singular_values_.double().square(), values[:k], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(components @ components.T, torch.eye(k).double(), rtol=0, atol=1e-5)
    # Equal counts make equal eigenvalues, so that only the energy along each component is determined.
    energies = (centred @ components.T).square().sum(dim=0)
    torch.testing.assert_close(energies, values[:k], rtol=1e-4, atol=1e-4)
    total = centred.square().sum() / max(len(tokens) - 1, 1)
    assert pca.total_variance_ == pytest.approx(float(total), abs=1e-9)


def test_order_and_batches_do_not_matter_and_parts_merge():
    tokens = torch.randint(0, 50, (400,), generator=torch.Generator().manual_seed(0))
    whole = OneHotPCA(8, n_features=50).partial_fit(tokens)
    pieces = OneHotPCA(8, n_features=50)
    for piece in tokens.flip(0).split(37):
        pieces.partial_fit(piece)
    halves = [OneHotPCA(8, n_features=50).partial_fit(half) for half in tokens.chunk(2)]
    restored = OneHotPCA.from_state(halves[1].state_dict())
    for other in (pieces, halves[0].merge(restored), OneHotPCA(8, n_features=50).merge(whole)):
        assert torch.equal(other.components_, whole.components_)
        assert torch.equal(other.singular_values_, whole.singular_values_)
        assert (other.n_samples_seen_, other.total_variance_) == (400, whole.total_variance_)


def test_more_components_than_tokens_seen_are_orthonormal_and_without_variance():
    pca = OneHotPCA(6, n_features=10).partial_fit(torch.tensor([3, 3, 7]))
    torch.testing.assert_close(pca.components_ @ pca.components_.T, torch.eye(6), rtol=0, atol=1e-6)
    assert pca.singular_values_[0] > 1 and pca.singular_values_[1:].abs().max() < 1e-3


@pytest.mark.parametrize("center", [True, False])
def test_scatter_along_directions_is_that_of_the_dense_formula(center):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 20, (100,), generator=generator)
    directions = torch.randn(7, 20, generator=generator)
    pca = OneHotPCA(4, n_features=20, center=center).partial_fit(tokens)
    rows = torch.nn.functional.one_hot(tokens, 20).float()
    expected = ((rows - center * rows.mean(dim=0)) @ directions.T).square().sum(dim=0)
    torch.testing.assert_close(pca.scatter_along(directions), expected)


@pytest.mark.on_cpu("an accelerator would have to wait for the largest token number")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0.5]), "whole numbers of shape"),
        (torch.tensor([[1]]), "whole numbers of shape"),
        (torch.tensor([5]), "between 0 and 4"),
        (torch.tensor([-1]), "between 0 and 4"),
    ],
)
def test_other_rows_are_refused_and_nothing_is_added(rows, message):
    pca = OneHotPCA(2, n_features=5)
    with pytest.raises(EvaError, match=message):
        pca.partial_fit(rows)
    assert not pca.partial_fit(torch.tensor([1, 2])).components_.isnan().any()
    assert pca.n_samples_seen_ == 2


def test_unequal_settings_do_not_merge():
    with pytest.raises(EvaError, match="n_features_in_ is 4 here and 5 there"):
        OneHotPCA(2, n_features=4).merge(OneHotPCA(2, n_features=5))


@pytest.mark.parametrize("center", [True, False])
def test_the_default_device_of_the_program_makes_no_difference(center):
    one, other = (
        OneHotPCA(2, n_features=5, center=center).partial_fit(torch.tensor([0, 0, 0, 3, 3, 1])) for _ in range(2)
    )
    with torch.device("meta"):
        found = one.components_
    assert torch.equal(found, other.components_)
