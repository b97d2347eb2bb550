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


def leading_state(pca):
    return pca.leading().state_dict()


def whole_state(pca):
    return pca.condensed().state_dict()


def check_same(found, wanted, *, atol=1e-6):
    assert (found.n_samples_seen_, found.n_components_) == (wanted.n_samples_seen_, wanted.n_components_)
    assert found.total_variance_ == pytest.approx(wanted.total_variance_)
    torch.testing.assert_close(found.mean_, wanted.mean_)
    torch.testing.assert_close(found.singular_values_, wanted.singular_values_)
    torch.testing.assert_close(found.components_, wanted.components_, rtol=0, atol=atol)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_leading_components_come_back(backend, center):
    pca = StreamingPCA(K, backend=backend, center=center).partial_fit(rows())
    state = leading_state(pca)
    assert sum(tensor.numel() for tensor in state.values()) <= (K + 1) * D + K + 40
    found = from_state(state)
    check_same(found, pca, atol=2e-5)
    torch.testing.assert_close(found.components_, pca.look().components, rtol=0, atol=1e-12)


@pytest.mark.parametrize("center", [True, False])
def test_merged_leading_components_are_about_those_of_all_rows(largest_angle, center):
    shares = [rows(seed=seed) + seed for seed in range(3)]
    pcas = [StreamingPCA(K, backend="exact", center=center).partial_fit(share) for share in shares]
    merged = functools.reduce(lambda a, b: a.merge(b), [from_state(leading_state(pca)) for pca in pcas])
    whole = StreamingPCA(K, backend="exact", center=center).partial_fit(torch.cat(shares))
    assert merged.total_variance_ == pytest.approx(whole.total_variance_)
    torch.testing.assert_close(merged.mean_, whole.mean_)
    torch.testing.assert_close(merged.singular_values_, whole.singular_values_, rtol=0.01, atol=0.01)
    assert largest_angle(merged.components_[:3], whole.components_[:3]) < 0.05


@pytest.mark.parametrize("n_rows", [1, 3])
def test_fewer_rows_than_components(n_rows):
    pca = StreamingPCA(K, backend="exact").partial_fit(rows(n_rows))
    found = from_state(leading_state(pca))
    torch.testing.assert_close(found.singular_values_, pca.singular_values_)
    more = StreamingPCA(K, backend="exact").partial_fit(rows(50, seed=1))
    both = found.merge(from_state(leading_state(more)))
    assert both.n_samples_seen_ == n_rows + 50 and torch.isfinite(both.components_).all()


def test_whole_states_of_exact_moments_that_were_asked_for_are_whole():
    pca = StreamingPCA(K, backend="exact").partial_fit(rows())
    assert whole_state(pca)["second_moment"].shape == (D, D)
    check_same(from_state(whole_state(pca)), pca)


def test_wide_exact_moments_that_were_chosen_for_speed_are_sent_as_more_components_than_asked_for():
    # Loaded as such, because which widths "auto" takes for exact is its own business.
    state = StreamingPCA(K, backend="exact").partial_fit(rows()).state_dict()
    pca = StreamingPCA(K).load_state_dict(state)
    assert (pca.backend, pca.backend_) == ("auto", "exact")
    sent = whole_state(pca)
    assert sent["components"].shape == (K + 48, D) and int(sent["n_components"]) == K
    check_same(from_state(sent), pca)
    narrow = StreamingPCA(K).partial_fit(rows(d=20))
    assert narrow.backend_ == "exact" and "second_moment" in whole_state(narrow)


def test_one_hot_and_stacked_states():
    counts = OneHotPCA(2, n_features=9).partial_fit(torch.arange(9) // 2)
    assert torch.equal(from_state(leading_state(counts)).components_, counts.components_)
    for state_of in (leading_state, whole_state):
        stack = StackedPCA(3, widths=[8, 8, 8], new_pca=functools.partial(StreamingPCA, backend="exact"))
        stack.partial_fit([rows(40, d=8), rows(0, d=8), rows(50, d=8, seed=1)])
        found = from_state(state_of(stack))
        assert [part.is_fitted and part.n_samples_seen_ for part in found.parts] == [40, False, 50]
        torch.testing.assert_close(found.components_, stack.components_, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.singular_values_, stack.singular_values_)


def test_counts_of_several_processes_are_added():
    pca = OneHotPCA(3, n_features=6).partial_fit(torch.tensor([0, 0, 1, 4]))
    merged = from_state(whole_state(pca)).merge(from_state(whole_state(pca)))
    twice = OneHotPCA(3, n_features=6).partial_fit(torch.tensor([0, 0, 1, 4] * 2))
    assert merged.n_samples_seen_ == 8 and torch.equal(merged.components_, twice.components_)
