"""What stands for a state where processes meet."""

from __future__ import annotations

import functools

import pytest
import torch

from evatune import StreamingPCA
from evatune.pca import from_state
from evatune.pca.one_hot import OneHotPCA
from evatune.pca.stacked import StackedPCA

D, K = 400, 6


def rows(n=300, *, d=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d + 1) ** -1.0
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scales + 2.0


def auto(rows_nd, **settings):
    """Return an exact object that "auto" chose; which widths it takes for that is its own business."""
    return from_state(StreamingPCA(K, backend="exact", **settings).partial_fit(rows_nd).state_dict())


def sent(pca):
    return pca.condensed().state_dict()


def check_same(found, wanted, *, atol=1e-6):
    assert (found.n_samples_seen_, found.n_components_) == (wanted.n_samples_seen_, wanted.n_components_)
    assert found.total_variance_ == pytest.approx(wanted.total_variance_)
    torch.testing.assert_close(found.mean_, wanted.mean_)
    torch.testing.assert_close(found.singular_values_, wanted.singular_values_)
    torch.testing.assert_close(found.components_, wanted.components_, rtol=0, atol=atol)


@pytest.mark.parametrize("center", [True, False])
def test_leading_components_of_a_wide_exact_moment_stand_for_it(center):
    pca = auto(rows(), center=center)
    state = sent(pca)
    assert state["components"].shape == (K + 48, D) and int(state["n_components"]) == K
    assert sum(tensor.numel() for tensor in state.values()) <= (K + 49) * D + K + 100
    found = from_state(state)
    assert (pca.backend_, found.backend_) == ("exact", "leading")
    check_same(found, pca)


@pytest.mark.parametrize("center", [True, False])
def test_merged_leading_components_are_about_those_of_all_rows(largest_angle, center):
    shares = [rows(seed=seed) + seed for seed in range(3)]
    merged = functools.reduce(
        lambda a, b: a.merge(b), [from_state(sent(auto(share, center=center))) for share in shares]
    )
    whole = StreamingPCA(K, backend="exact", center=center).partial_fit(torch.cat(shares))
    assert merged.total_variance_ == pytest.approx(whole.total_variance_)
    torch.testing.assert_close(merged.mean_, whole.mean_)
    torch.testing.assert_close(merged.singular_values_, whole.singular_values_, rtol=1e-3, atol=1e-3)
    assert largest_angle(merged.components_[:3], whole.components_[:3]) < 0.01


@pytest.mark.parametrize("n_rows", [1, 3])
def test_fewer_rows_than_components(n_rows):
    pca = auto(rows(n_rows))
    found = from_state(sent(pca))
    torch.testing.assert_close(found.singular_values_, pca.singular_values_)
    both = found.merge(from_state(sent(auto(rows(50, seed=1)))))
    assert both.n_samples_seen_ == n_rows + 50 and torch.isfinite(both.components_).all()


def test_exact_moments_that_were_asked_for_or_are_narrow_are_sent_whole():
    pca = StreamingPCA(K, backend="exact").partial_fit(rows())
    assert sent(pca)["second_moment"].shape == (D, D)
    check_same(from_state(sent(pca)), pca)
    assert "second_moment" in sent(auto(rows(d=20)))


def test_one_hot_and_stacked_states():
    counts = OneHotPCA(2, n_features=9).partial_fit(torch.arange(9) // 2)
    assert torch.equal(from_state(sent(counts)).components_, counts.components_)
    stack = StackedPCA(3, widths=[8, 8, 8], new_pca=functools.partial(StreamingPCA, backend="exact"))
    stack.partial_fit([rows(40, d=8), rows(0, d=8), rows(50, d=8, seed=1)])
    found = from_state(sent(stack))
    assert [part.is_fitted and part.n_samples_seen_ for part in found.parts] == [40, False, 50]
    torch.testing.assert_close(found.components_, stack.components_, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.singular_values_, stack.singular_values_)


@pytest.mark.parametrize("alike", [(True, False), (False, True), (False, False)])
def test_the_parts_of_merged_stacks_are_alike_where_those_of_either_are(alike):
    """A process learns it from its first rows of any expert, and may have seen none."""
    stacks = [
        StackedPCA(2, widths=[8, 8], new_pca=StreamingPCA, alike=one).partial_fit([rows(20, d=8), rows(0, d=8)])
        for one in alike
    ]
    assert from_state(sent(stacks[0])).merge(from_state(sent(stacks[1]))).alike == any(alike)


def test_counts_of_several_processes_are_added():
    pca = OneHotPCA(3, n_features=6).partial_fit(torch.tensor([0, 0, 1, 4]))
    merged = from_state(sent(pca)).merge(from_state(sent(pca)))
    twice = OneHotPCA(3, n_features=6).partial_fit(torch.tensor([0, 0, 1, 4] * 2))
    assert merged.n_samples_seen_ == 8 and torch.equal(merged.components_, twice.components_)
