"""What must hold for any rows, whatever the seed: invariances and equivariances."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evatune import StreamingPCA

EVERY_BACKEND = pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
PLENTY = settings(max_examples=12, deadline=None, derandomize=True)
N_ROWS, N_FEATURES, K = 240, 130, 5
GAPPED = 0.6 ** np.arange(N_FEATURES)
seeds = st.integers(0, 2**31 - 1)
"""The sketch of 5 components has 104 columns here, fewer than there are features."""


def aligned(pca: StreamingPCA, components: torch.Tensor) -> torch.Tensor:
    """Cosine of each component with the one expected, sign and all."""
    return (pca.components_ * components).sum(dim=1)


@PLENTY
@given(seed=seeds, cuts=st.lists(st.integers(1, N_ROWS - 1), max_size=12, unique=True))
def test_the_exact_backend_does_not_see_how_rows_are_cut_into_batches(known_rows, stream, seed, cuts):
    known = known_rows(N_ROWS, GAPPED, mean=5.0, seed=seed)
    bounds = [0, *sorted(cuts), N_ROWS]
    whole = stream([known.rows], K, backend="exact")
    cut = stream([known.rows[a:b] for a, b in pairwise(bounds)], K, backend="exact")
    torch.testing.assert_close(cut.components_, whole.components_, rtol=0, atol=1e-8)
    torch.testing.assert_close(cut.singular_values_, whole.singular_values_, rtol=1e-9, atol=0)
    torch.testing.assert_close(cut.var_, whole.var_, rtol=1e-9, atol=0)
    assert cut.n_samples_seen_ == whole.n_samples_seen_


@PLENTY
@given(seed=seeds, size=st.integers(7, 100))
def test_the_exact_backend_does_not_see_the_order_of_rows(known_rows, stream, seed, size):
    known = known_rows(N_ROWS, GAPPED, mean=5.0, seed=seed)
    order = torch.randperm(N_ROWS, generator=torch.Generator().manual_seed(seed))
    straight = stream(known.rows.split(size), K, backend="exact")
    shuffled = stream(known.rows[order].split(size), K, backend="exact")
    torch.testing.assert_close(shuffled.components_, straight.components_, rtol=0, atol=1e-8)
    torch.testing.assert_close(shuffled.singular_values_, straight.singular_values_, rtol=1e-9, atol=0)


@pytest.mark.parametrize("order", ["as drawn", "shuffled", "largest rows first", "largest rows last"])
@pytest.mark.parametrize("size", [40, 100, 480, 2400])
def test_the_sketch_captures_the_optimum_in_any_order_and_batch_size(known_rows, stream, oracle, size, order):
    """At least 0.9999 of what the first half of the components can capture, as for the rows in one piece."""
    known = known_rows(2400, np.arange(1, 201) ** -0.75, mean=2.0, seed=3)
    norms = (known.rows - known.mean).norm(dim=1)
    permutation = {
        "as drawn": torch.arange(2400),
        "shuffled": torch.randperm(2400, generator=torch.Generator().manual_seed(0)),
        "largest rows first": norms.argsort(descending=True),
        "largest rows last": norms.argsort(),
    }[order]
    pca = stream(known.rows[permutation].split(size), 16, backend="sketch")
    assert oracle(known.rows).captured_by(pca.components_, 8) > 0.9999


@EVERY_BACKEND
@PLENTY
@given(seed=seeds)
def test_rotating_the_rows_rotates_the_components(known_rows, stream, backend, seed):
    known = known_rows(N_ROWS, GAPPED, seed=seed)
    rotation = torch.linalg.qr(
        torch.randn(N_FEATURES, N_FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ).Q
    plain = stream(known.batches(60), K, backend=backend)
    rotated = stream([batch @ rotation for batch in known.batches(60)], K, backend=backend)
    loose = 1e-8 if backend == "exact" else 1e-4
    assert (aligned(rotated, plain.components_ @ rotation).abs() > 1 - loose).all()
    torch.testing.assert_close(rotated.singular_values_, plain.singular_values_, rtol=loose, atol=0)


@EVERY_BACKEND
@PLENTY
@given(seed=seeds, times=st.integers(2, 4))
def test_repeating_all_rows_changes_no_direction_and_no_share(known_rows, stream, backend, seed, times):
    known = known_rows(N_ROWS, GAPPED, seed=seed)
    once = stream([known.rows], K, backend=backend)
    often = stream([known.rows] * times, K, backend=backend)
    # Algorithm 2 truncates after every batch, but repeated rows bring nothing new.
    assert (aligned(often, once.components_) > 1 - 1e-5).all()
    torch.testing.assert_close(often.explained_variance_ratio_, once.explained_variance_ratio_, rtol=2e-3, atol=0)
    torch.testing.assert_close(often.singular_values_, once.singular_values_ * times**0.5, rtol=2e-3, atol=0)


@EVERY_BACKEND
@PLENTY
@given(seed=seeds, size=st.sampled_from([1.0, 100.0, 1e4]))
def test_adding_a_constant_moves_the_mean_and_nothing_else(known_rows, stream, backend, seed, size):
    """In float32 with means up to 10⁴ deviations, where sums of squares about zero would lose every digit."""
    known = known_rows(N_ROWS, GAPPED, mean=0.0, seed=seed)
    offset = size * torch.randn(N_FEATURES, generator=torch.Generator().manual_seed(seed))
    # Rounded to multiples of 2⁻⁸ of the offset's last digits, so that both sets of rows are exact in float32.
    grid = 2.0 ** (np.ceil(np.log2(size + 1)) - 17)
    rows = (known.rows / grid).round().float() * grid
    offset = (offset / grid).round() * grid
    plain = stream(rows.split(60), K, backend=backend)
    moved = stream((rows + offset).split(60), K, backend=backend)
    torch.testing.assert_close(moved.mean_, plain.mean_ + offset, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(moved.var_, plain.var_, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(moved.singular_values_[:3], plain.singular_values_[:3], rtol=2e-3, atol=0)
    assert (aligned(moved, plain.components_)[:3].abs() > 0.999).all()


@EVERY_BACKEND
@PLENTY
@given(seed=seeds, factor=st.sampled_from([1e-6, 1e-3, 0.5, 3.0, 1e5]))
def test_scaling_the_rows_scales_the_singular_values_alone(known_rows, stream, backend, seed, factor):
    known = known_rows(N_ROWS, GAPPED, seed=seed)
    plain = stream([batch.float() for batch in known.batches(60)], K, backend=backend)
    scaled = stream([(batch * factor).float() for batch in known.batches(60)], K, backend=backend)
    assert (aligned(scaled, plain.components_) > 0.9999).all()
    torch.testing.assert_close(scaled.singular_values_, plain.singular_values_ * factor, rtol=2e-3, atol=0)
    torch.testing.assert_close(scaled.explained_variance_ratio_, plain.explained_variance_ratio_, rtol=2e-3, atol=0)


@EVERY_BACKEND
@PLENTY
@given(seed=seeds)
def test_the_largest_entry_of_each_component_is_positive(known_rows, stream, backend, seed):
    known = known_rows(N_ROWS, GAPPED, seed=seed)
    for sign in (1.0, -1.0):
        components = stream([sign * known.rows], K, backend=backend).components_
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        assert (largest > 0).all()


@EVERY_BACKEND
def test_equal_rows_and_equal_seed_give_equal_bits(known_rows, stream, backend):
    known = known_rows(N_ROWS, GAPPED, seed=0)
    first, second = (stream([b.float() for b in known.batches(50)], K, backend=backend, seed=9) for _ in range(2))
    assert torch.equal(first.components_, second.components_)
    assert torch.equal(first.singular_values_, second.singular_values_)


@EVERY_BACKEND
def test_the_global_generator_of_torch_is_neither_read_nor_moved(known_rows, stream, backend):
    known = known_rows(N_ROWS, GAPPED, seed=0)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(stream(known.batches(50), K, backend=backend).components_)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


@EVERY_BACKEND
def test_looking_at_the_components_does_not_change_what_comes_after(known_rows, stream, backend):
    known = known_rows(N_ROWS, GAPPED, seed=0)
    quiet, watched = StreamingPCA(K, backend=backend), StreamingPCA(K, backend=backend)
    for batch in known.batches(50):
        quiet.partial_fit(batch)
        watched.partial_fit(batch)
        _ = watched.components_, watched.explained_variance_ratio_, watched.mean_, watched.state_dict()
    assert torch.equal(quiet.components_, watched.components_)
    assert torch.equal(quiet.singular_values_, watched.singular_values_)


READ = ("components_", "singular_values_", "explained_variance_ratio_", "captured_error_", "mean_", "var_")


@EVERY_BACKEND
def test_what_an_attribute_tells_does_not_depend_on_what_was_read_before(known_rows, backend):
    """Also of rows so wide that components are found by iteration."""
    batches = known_rows(500, np.arange(1, 401) ** -0.3, seed=0).batches(125)

    def told(before):
        pca = StreamingPCA(K, backend=backend, product_dtype=torch.float32)
        for batch in batches:
            pca.partial_fit(batch.float())
            for name in before:
                getattr(pca, name)
        return {name: getattr(pca, name) for name in READ}

    expected = told(())
    for before in (READ, READ[::-1], READ[:1]):
        found = told(before)
        for name in READ:
            assert torch.equal(torch.as_tensor(found[name]).nan_to_num(), torch.as_tensor(expected[name]).nan_to_num())


@EVERY_BACKEND
def test_rows_are_neither_changed_nor_kept(known_rows, backend):
    rows = known_rows(N_ROWS, GAPPED, seed=0).rows.requires_grad_()
    before = rows.detach().clone()
    pca = StreamingPCA(K, backend=backend).partial_fit(rows)
    assert torch.equal(rows, before)
    components = pca.components_.clone()
    with torch.no_grad():
        rows.zero_()
    pca.partial_fit(before[:0])
    assert torch.equal(pca.components_, components) and not pca.components_.requires_grad
    assert pca.partial_fit(before).n_samples_seen_ == 2 * N_ROWS
    torch.testing.assert_close(pca.mean_, before.mean(dim=0))


@EVERY_BACKEND
def test_fit_forgets_what_was_seen_before(known_rows, stream, backend):
    known, other = known_rows(N_ROWS, GAPPED, seed=0), known_rows(N_ROWS, GAPPED[:50], seed=1)
    pca = stream(other.batches(50), K, backend=backend).fit(known.rows)
    assert torch.equal(pca.components_, stream([known.rows], K, backend=backend).components_)
    assert pca.n_samples_seen_ == N_ROWS
