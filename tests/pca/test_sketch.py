"""The sketch's estimate of its own error, and what it does about it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evatune import EvaError, StreamingPCA
from evatune.pca import sketch, widths
from evatune.pca.together import alone
from evatune.pca.widths import N_PROBES, sketch_width, widest_sketch

K = 8


def drifting(n_batches, n_features, *, decay, seed, n_rows=256):
    """Return batches whose spectrum falls slowly and whose axes turn a little from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.arange(1, n_features + 1).double() ** -decay
    turn = torch.linalg.qr(
        torch.eye(n_features).double() + 0.02 * torch.randn(n_features, n_features, generator=generator).double()
    ).Q
    batches, axes = [], torch.eye(n_features).double()
    for _ in range(n_batches):
        batches.append((torch.randn(n_rows, n_features, generator=generator).double() * deviations) @ axes)
        axes = axes @ turn
    return batches


def fitted(batches, **settings):
    pca = StreamingPCA(K, backend="sketch", **settings)
    for batch in batches:
        pca.partial_fit(batch)
    return pca


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("decay", "dtype"), [(0.25, torch.float64), (0.5, torch.float64), (0.5, torch.float32)])
def test_the_estimated_error_is_about_the_true_one(oracle, decay, dtype, seed):
    batches = [batch.to(dtype) for batch in drifting(12, 600, decay=decay, seed=seed)]
    pca = fitted(batches, tolerance=None, seed=seed, product_dtype=dtype)
    missed = 1 - oracle(torch.cat(batches)).captured_by(pca.components_, K)
    assert missed > 1e-5, "or there is nothing to estimate"
    assert 0.4 * missed < pca.captured_error_ < 3 * missed


def test_inputs_of_one_width_begin_from_the_same_columns_whatever_rows_others_got():
    first, second = StreamingPCA(K, backend="sketch"), StreamingPCA(K, backend="sketch")
    one, other = drifting(2, 600, decay=0.5, seed=0)
    alone = StreamingPCA(K, backend="sketch", seed=0).fit(other).components_
    sketch._random_columns.cache_clear()
    first.fit(one)
    assert torch.equal(second.fit(other).components_, alone)
    assert sketch._random_columns.cache_info().misses == 1, "drawing them takes longer than the first batch's products"


def test_without_a_tolerance_the_sketch_stays_as_it_is():
    pca = fitted(drifting(8, 1200, decay=0.25, seed=0), tolerance=None)
    assert pca.backend_ == "sketch" and pca._state.width == sketch_width(K, 1200)
    assert pca.captured_error_ > 1e-3


def test_a_sketch_that_misses_too_much_gets_wider_but_not_beyond_a_bound(oracle, monkeypatch):
    monkeypatch.setattr(widths, "EXACT_UP_TO", 0)
    batches = drifting(16, 1200, decay=0.25, seed=0)
    plain, wider = fitted(batches, tolerance=None), fitted(batches)
    assert wider.backend_ == "sketch"
    assert sketch_width(K, 1200) < wider._state.width <= widest_sketch(K, 1200)
    assert wider.captured_error_ < 0.7 * plain.captured_error_
    truth = oracle(torch.cat(batches))
    assert 1 - truth.captured_by(wider.components_, K) < 0.7 * (1 - truth.captured_by(plain.components_, K))


@pytest.mark.parametrize(
    ("n_components", "n_features", "widest"),
    [(32, 4096, 392), (256, 4096, 616), (256, 16384, 616), (8, 1200, 300), (32, 700, 120), (256, 2304, 576)],
)
def test_the_widest_sketch_has_four_times_the_spare_columns_or_a_quarter_of_the_features(
    n_components, n_features, widest
):
    assert widest_sketch(n_components, n_features) == widest


def test_a_sketch_gets_no_wider_than_it_seems_to_need(monkeypatch):
    monkeypatch.setattr(widths, "EXACT_UP_TO", 0)
    batches = drifting(2, 900, decay=0.35, seed=0)
    loose, middle, strict = (fitted(batches, tolerance=tolerance)._state.width for tolerance in (0.1, 0.04, 1e-3))
    assert sketch_width(K, 900) == loose < middle < strict == widest_sketch(K, 900)
    assert middle < 1.6 * loose and (middle + N_PROBES) % 16 == 0


def test_many_components_may_miss_more_while_rows_are_few(monkeypatch):
    """But not of the first batch: all its rows are at hand, and what is missed is for want of columns."""
    monkeypatch.setattr(widths, "EXACT_UP_TO", 0)
    batches = drifting(2, 900, decay=1.0, seed=0)

    def widths_of(tolerance):
        pca = StreamingPCA(3 * K, backend="sketch", tolerance=tolerance)
        return [pca.partial_fit(batch)._state.width for batch in batches]

    begin = sketch_width(3 * K, 900)
    assert widths_of(1.5e-3) == [begin, begin]
    assert widths_of(2e-11)[0] > begin
    monkeypatch.setattr(sketch, "SETTLED", 0)
    assert widths_of(1.5e-3)[0] == begin < widths_of(1.5e-3)[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_narrow_rows_that_a_sketch_misses_are_followed_exactly(oracle, seed):
    batches = drifting(16, 700, decay=0.25, seed=seed)
    pca = fitted(batches, seed=seed)
    assert pca.backend_ == "exact"
    assert oracle(torch.cat(batches)).captured_by(pca.components_, K) > 1 - 1e-9, "the first batch showed it"
    assert pca.captured_error_ == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_a_sketch_had_missed_before_it_became_exact_is_not_forgotten(oracle, seed):
    batches = [*drifting(1, 700, decay=2.0, seed=seed), *drifting(15, 700, decay=0.3, seed=seed)]
    pca = StreamingPCA(K, backend="sketch", seed=seed)
    backends = [pca.partial_fit(batch).backend_ for batch in batches]
    assert backends[0] == "sketch" and backends[-1] == "exact"
    missed = 1 - oracle(torch.cat(batches)).captured_by(pca.components_, K)
    assert 0 < missed < 1e-3
    assert missed / 10 < pca.captured_error_ < 10 * missed


def missed(pca):
    return alone(pca._state.missed())


def test_a_merge_misses_what_either_side_did():
    batches = [*drifting(1, 700, decay=2.0, seed=0), *drifting(15, 700, decay=0.3, seed=0)]
    halves = [fitted(batches, seed=seed) for seed in (0, 1)]
    assert all(pca.backend_ == "exact" and pca.captured_error_ > 0 for pca in halves)
    merged = halves[0].merge(halves[1])
    assert missed(merged) == pytest.approx(sum(map(missed, halves)))
    # The same rows twice: twice as much is missed of twice as much.
    assert merged.captured_error_ == pytest.approx(sum(pca.captured_error_ for pca in halves) / 2, rel=1e-3)


def test_a_spectrum_that_falls_fast_needs_no_more():
    batches = drifting(8, 1200, decay=2.0, seed=0)
    pca = fitted(batches)
    assert pca.backend_ == "sketch" and pca._state.width == sketch_width(K, 1200)
    assert pca.captured_error_ < 1e-5


@pytest.mark.parametrize("center", [True, False])
def test_the_estimate_survives_a_merge_and_a_round_trip(oracle, center):
    batches = [batch + 0.3 for batch in drifting(12, 600, decay=0.5, seed=0)]
    halves = [
        fitted(half, tolerance=None, center=center, seed=seed) for seed, half in enumerate((batches[:4], batches[4:]))
    ]
    halves[1].refresh()
    merged = halves[0].merge(halves[1])
    missed = 1 - oracle(torch.cat(batches), center=center).captured_by(merged.components_, K)
    assert 0.3 * missed < merged.captured_error_ < 3 * missed
    loaded = StreamingPCA(K, tolerance=None, center=center).load_state_dict(merged.state_dict())
    assert loaded.captured_error_ == pytest.approx(merged.captured_error_, rel=1e-6)
    more = drifting(1, 600, decay=0.5, seed=1)[0]
    assert torch.equal(loaded.partial_fit(more).components_, merged.partial_fit(more).components_)


def test_sketches_of_different_widths_merge(monkeypatch):
    monkeypatch.setattr(widths, "EXACT_UP_TO", 0)
    batches = drifting(16, 1200, decay=0.25, seed=0)
    narrow, wide = fitted(batches[:1], tolerance=None), fitted(batches[1:])
    assert narrow._state.width < wide._state.width
    for merged in (narrow.merge(wide), wide.merge(narrow)):
        assert merged._state.width == wide._state.width
        assert merged.n_samples_seen_ == 16 * 256


def test_a_sketch_merges_with_one_that_became_exact(oracle):
    batches = drifting(16, 700, decay=0.25, seed=0)
    thin, exact = fitted(batches[:1], tolerance=None), fitted(batches[1:])
    assert (thin.backend_, exact.backend_) == ("sketch", "exact")
    truth = oracle(torch.cat(batches))
    for merged in (thin.merge(exact), exact.merge(thin)):
        assert merged.backend_ == "exact"
        assert 1 - truth.captured_by(merged.components_, K) < 2e-3


def test_nothing_is_known_of_the_error_of_algorithm_2():
    assert math.isnan(StreamingPCA(2, backend="incremental").partial_fit(torch.randn(20, 8)).captured_error_)


def test_rows_without_variance_miss_nothing():
    pca = StreamingPCA(2, backend="sketch").partial_fit(torch.ones(20, 300))
    assert pca.captured_error_ == 0.0


@pytest.mark.parametrize("tolerance", [0, 1, -0.5, np.nan])
def test_a_tolerance_out_of_range_is_refused(tolerance):
    with pytest.raises(EvaError, match="tolerance must be between 0 and 1, or None"):
        StreamingPCA(2, tolerance=tolerance)


@pytest.mark.parametrize("decay", [0.25, 1.0])
def test_refreshes_in_float32_lose_nothing(oracle, decay):
    batches = drifting(8, 800, decay=decay, seed=0)
    half, whole = (
        StreamingPCA(64, backend="sketch", tolerance=None, product_dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for batch in batches:
        half.partial_fit(batch.float())
        whole.partial_fit(batch)
    truth = oracle(torch.cat(batches))
    missed = 1 - truth.captured_by(whole.components_, 64)
    assert 1 - truth.captured_by(half.components_, 64) == pytest.approx(missed, rel=1e-2, abs=1e-6)
    assert half.captured_error_ == pytest.approx(whole.captured_error_, rel=1e-2, abs=1e-6)
    gram = half.components_ @ half.components_.T
    torch.testing.assert_close(gram, torch.eye(64), rtol=0, atol=1e-6)


def test_components_of_few_rows_are_orthonormal_to_float32():
    """The sketch's own directions beyond the rank of the rows are made of rounding errors."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.arange(1, 3001).float().rsqrt()
    pca = StreamingPCA(32, backend="sketch")
    for _ in range(3):
        pca.partial_fit(torch.randn(3, 3000, generator=generator) * deviations)
    torch.testing.assert_close(pca.components_ @ pca.components_.T, torch.eye(32), rtol=0, atol=1e-6)


def test_the_leading_eigenvectors_are_orthonormal_to_float64():
    """They come from a refresh in float32, and are corrected."""
    pca = fitted([batch.float() for batch in drifting(4, 600, decay=0.5, seed=0)], tolerance=None)
    vectors, _ = alone(pca._state.eigenpairs(K))
    leading = vectors[:, :K]
    assert vectors.dtype == torch.float64
    assert float((leading.T @ leading - torch.eye(K, dtype=torch.float64)).abs().max()) < 1e-11


def test_a_refresh_without_new_rows_is_no_work(monkeypatch):
    pca = fitted(drifting(4, 700, decay=1.0, seed=0), tolerance=None)
    pca.refresh()
    before = pca._state.columns_dm, pca._state.sums_dm
    pca.refresh()
    assert pca._state.columns_dm is before[0] and pca._state.sums_dm is before[1]


def test_a_state_that_is_loaded_or_becomes_exact_under_autocast_is_not_rounded():
    batches = [batch.float() for batch in drifting(16, 700, decay=0.25, seed=0)]
    thin, exact = fitted(batches[:1], tolerance=None), fitted(batches[1:])
    assert (thin.backend_, exact.backend_) == ("sketch", "exact")

    def states():
        return StreamingPCA(K).load_state_dict(thin.state_dict())._state.sums_dm, thin.merge(exact).components_

    plain = states()
    with torch.autocast("cpu", torch.bfloat16):
        inside = states()
    for found, expected in zip(inside, plain, strict=True):
        assert torch.equal(found, expected)


def test_a_sketch_of_constant_rows_merges_with_an_exact_state():
    batches = drifting(16, 700, decay=0.25, seed=0)
    exact, constant = fitted(batches), fitted([torch.ones(64, 700).double()])
    assert (exact.backend_, constant.backend_) == ("exact", "sketch")
    merged = constant.merge(exact)
    assert merged.n_samples_seen_ == 16 * 256 + 64 and merged.captured_error_ == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_of_fewer_directions_than_columns_are_not_drowned_by_rounding(oracle, seed):
    """As the embeddings of a few different tokens are: what the other columns see of them is rounding error only."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(64, 320, generator=generator)
    batches = [vectors[torch.randint(0, 64, (232,), generator=generator)] for _ in range(4)]
    pca = StreamingPCA(K, backend="sketch", seed=seed, product_dtype=torch.bfloat16)
    for batch in batches:
        pca.partial_fit(batch)
    assert oracle(torch.cat(batches)).captured_by(pca.components_, K) > 1 - 1e-3
    exact = StreamingPCA(K, backend="exact", product_dtype=torch.float32).partial_fit(torch.cat(batches))
    torch.testing.assert_close(pca.singular_values_, exact.singular_values_, rtol=1e-2, atol=0)
