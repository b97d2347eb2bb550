"""Merging what was learned apart, and carrying it through a file."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evatune import EvaError, StreamingPCA
from evatune.pca import from_state

EVERY_BACKEND = pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
FALLING = 0.65 ** np.arange(130)
K = 6


@pytest.fixture
def parts(known_rows):
    """Three sets of rows with means far apart, so that each part is about another shift."""
    return [known_rows(200 + 50 * i, FALLING, mean=3.0, seed=i).rows for i in range(3)]


def cosines(first, second):
    return (first.components_ * second.components_).sum(dim=1)


def check_attributes(found, wanted, *, tolerance, n_compared=K):
    """Compare everything that an object tells of its rows, of the first components."""
    same = ("n_samples_seen_", "n_features_in_", "n_components_", "backend_", "is_fitted")
    assert [getattr(found, name) for name in same] == [getattr(wanted, name) for name in same]
    assert (cosines(found, wanted)[:n_compared] > 1 - tolerance).all()
    for name in ("singular_values_", "explained_variance_", "explained_variance_ratio_"):
        mine, theirs = getattr(found, name)[:n_compared], getattr(wanted, name)[:n_compared]
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=0, msg=name)
    # Count, mean and variance are sums: they merge without loss whatever the backend.
    torch.testing.assert_close(found.mean_, wanted.mean_, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.var_, wanted.var_, rtol=1e-9, atol=0)
    assert found.total_variance_ == pytest.approx(wanted.total_variance_, rel=1e-9)
    assert found.captured_error_ == pytest.approx(wanted.captured_error_, rel=0.5, abs=1e-12, nan_ok=True)
    now, now_wanted = found.snapshot(), wanted.snapshot()
    assert now.n_samples_seen == now_wanted.n_samples_seen
    assert now.total_variance == found.total_variance_
    torch.testing.assert_close(
        now.explained_variance[:n_compared], now_wanted.explained_variance[:n_compared], rtol=tolerance, atol=0
    )
    directions = torch.randn(3, found.n_features_in_, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(
        found.scatter_along(directions), wanted.scatter_along(directions), rtol=max(10 * tolerance, 1e-9), atol=0
    )


@EVERY_BACKEND
@pytest.mark.parametrize("center", [True, False])
def test_merging_two_parts_equals_one_pass_over_both(stream, parts, backend, center):
    settings = {"backend": backend, "center": center}
    apart = stream(parts[0].split(64), K, **settings).merge(stream(parts[1].split(64), K, **settings))
    together = stream([*parts[0].split(64), *parts[1].split(64)], K, **settings)
    check_attributes(apart, together, tolerance=1e-8 if backend == "exact" else 2e-2, n_compared=K // 2)
    torch.testing.assert_close(apart.mean_, torch.cat(parts[:2]).mean(dim=0), rtol=0, atol=1e-10)


@EVERY_BACKEND
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("is_refreshed", [True, False])
def test_a_reloaded_object_tells_the_same(stream, parts, backend, center, is_refreshed):
    pca = stream([*parts[0].split(64), *parts[1].split(64)], K, backend=backend, center=center)
    if is_refreshed:
        pca.refresh()
    check_attributes(from_state(pca.state_dict()), pca, tolerance=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_merged_sketch_knows_what_it_misses_as_one_that_saw_all_rows_does(stream, known_rows, oracle, seed):
    """Of parts whose means are far apart, so that the mean of all is far from the shift that either began with."""
    parts = [known_rows(500, np.arange(1, 401) ** -0.4, mean=0.0, seed=2 * seed + i).rows + 5.0 * i for i in range(2)]
    settings = {"backend": "sketch", "tolerance": None}
    first, second = (stream(part.split(100), K, **settings) for part in parts)
    whole = stream(torch.cat(parts).split(100), K, **settings)
    truth = oracle(torch.cat(parts))
    for pca in (whole, first.merge(second), second.merge(first)):
        missed = 1 - truth.captured_by(pca.components_, K)
        assert missed / 5 < pca.captured_error_ < 5 * missed


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_merges_are_associative_and_commutative_to_rounding(stream, known_rows, seed):
    a, b, c = (
        stream([known_rows(150, FALLING, mean=3.0, seed=10 * seed + i).rows], K, backend="exact") for i in range(3)
    )
    left, right, turned = a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(b).merge(a)
    for other in (right, turned):
        torch.testing.assert_close(other.components_, left.components_, rtol=0, atol=1e-8)
        torch.testing.assert_close(other.singular_values_, left.singular_values_, rtol=1e-9, atol=0)
        torch.testing.assert_close(other.mean_, left.mean_, rtol=0, atol=1e-10)
        torch.testing.assert_close(other.var_, left.var_, rtol=1e-9, atol=0)


@EVERY_BACKEND
def test_the_merged_object_goes_on_learning(stream, oracle, parts, backend):
    merged = stream([parts[0]], K, backend=backend).merge(stream([parts[1]], K, backend=backend))
    for batch in parts[2].split(50):
        merged.partial_fit(batch)
    least = {"exact": 1 - 1e-9, "sketch": 0.9999, "incremental": 0.995}[backend]
    assert oracle(torch.cat(parts)).captured_by(merged.components_, K // 2) > least


@EVERY_BACKEND
def test_merging_changes_neither_operand(stream, parts, backend):
    first, second = (stream([part], K, backend=backend) for part in parts[:2])
    before = [{n: t.clone() for n, t in pca.state_dict().items()} for pca in (first, second)]
    merged = first.merge(second)
    merged.partial_fit(parts[2])
    for pca, state in zip((first, second), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in pca.state_dict().items())


@EVERY_BACKEND
def test_merging_with_one_that_saw_nothing_gives_the_other(stream, parts, backend):
    fitted, empty = stream([parts[0]], K, backend=backend), StreamingPCA(K, backend=backend)
    for merged in (fitted.merge(empty), empty.merge(fitted)):
        torch.testing.assert_close(merged.components_, fitted.components_, rtol=0, atol=1e-9)
        assert merged.n_samples_seen_ == fitted.n_samples_seen_
    assert not hasattr(empty.merge(empty), "components_")


@EVERY_BACKEND
def test_float32_parts_with_large_and_different_means_merge(stream, oracle, known_rows, backend):
    rows = [known_rows(300, FALLING, mean=0.0, seed=i).rows + 50.0 * i for i in range(3)]
    apart = [stream([part.float()], K, backend=backend) for part in rows]
    merged = apart[0].merge(apart[1]).merge(apart[2])
    truth = oracle(torch.cat([part.float() for part in rows]))
    torch.testing.assert_close(merged.var_.double(), truth.variance, rtol=1e-4, atol=0)
    assert truth.captured_by(merged.components_, 3) > 0.999


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        ({}, {"n_components": 3}, "only equal settings merge, but n_components is 2 here and 3 there"),
        ({"center": False}, {}, "center is False here and True there"),
        ({"backend": "exact"}, {"backend": "incremental"}, "backend_ is 'exact' here and 'incremental' there"),
        ({}, {"width": 9}, "n_features_in_ is 8 here and 9 there"),
    ],
)
def test_what_does_not_agree_does_not_merge(mine, theirs, message):
    first, second = (
        StreamingPCA(
            s.get("n_components", 2), backend=s.get("backend", "auto"), center=s.get("center", True)
        ).partial_fit(torch.randn(20, s.get("width", 8)))
        for s in (mine, theirs)
    )
    with pytest.raises(EvaError, match=re.escape(message)):
        first.merge(second)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_state_goes_through_a_file_and_continues_identically(stream, parts, tmp_path, backend, dtype):
    batches = [batch.to(dtype) for part in parts for batch in part.split(64)]
    stayed = stream(batches[:5], K, backend=backend, seed=3)
    save_file({name: tensor.cpu() for name, tensor in stayed.state_dict().items()}, tmp_path / "state.safetensors")
    saved = load_file(tmp_path / "state.safetensors")
    returned = StreamingPCA(K, backend=backend, seed=3).load_state_dict(saved, device=batches[0].device)
    # To rounding: an object may remember the factorization that made its state. What follows is equal bit for bit.
    for name in ("components_", "singular_values_", "mean_", "var_"):
        torch.testing.assert_close(getattr(returned, name), getattr(stayed, name), rtol=1e-5, atol=1e-6, msg=name)
    for batch in batches[5:]:
        stayed.partial_fit(batch)
        returned.partial_fit(batch)
    for name in ("components_", "singular_values_", "explained_variance_ratio_", "mean_", "var_"):
        assert torch.equal(getattr(returned, name), getattr(stayed, name)), name
    assert returned.n_samples_seen_ == stayed.n_samples_seen_ and returned.backend_ == stayed.backend_


@EVERY_BACKEND
def test_a_snapshot_does_not_change_with_the_next_batch(stream, parts, backend):
    pca = stream([parts[0]], K, backend=backend)
    for _ in range(2):  # before and after a refresh, when a sketch is saved in another form
        snapshot = pca.state_dict()
        before = {name: tensor.clone() for name, tensor in snapshot.items()}
        pca.partial_fit(parts[1])
        assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot.items())
        pca.refresh()


@EVERY_BACKEND
def test_loading_forgets_what_was_found_of_other_rows(stream, parts, backend):
    pca, other = (stream([part], K, backend=backend) for part in parts[:2])
    _ = pca.components_, pca.snapshot()
    pca.load_state_dict(other.state_dict())
    torch.testing.assert_close(pca.components_, other.components_, rtol=0, atol=1e-9)
    torch.testing.assert_close(pca.snapshot().components, other.snapshot().components, rtol=0, atol=1e-9)


def test_a_merge_needs_full_precision_where_either_side_does(stream):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(600, 300, generator=generator) * torch.arange(1, 301).float() ** -0.3
    massive = flat + 1e4 * torch.randn(600, 1, generator=generator) * torch.nn.functional.one_hot(torch.tensor(5), 300)
    settings = {"backend": "exact", "product_dtype": torch.bfloat16}
    quiet, loud = (stream(rows.split(200), K, **settings) for rows in (flat, massive))
    assert not quiet._state.needs_full_precision and loud._state.needs_full_precision
    expected = stream([flat, massive, massive], K, backend="exact", product_dtype=torch.float32)
    for merged in (quiet.merge(loud), loud.merge(quiet)):
        assert merged._state.needs_full_precision
        merged.partial_fit(massive)  # in full: small directions beside the massive one survive
        torch.testing.assert_close(merged.singular_values_, expected.singular_values_, rtol=1e-3, atol=0)
    assert not quiet.merge(quiet)._state.needs_full_precision


@EVERY_BACKEND
def test_a_state_is_a_copy(stream, parts, backend):
    pca = stream([parts[0]], K, backend=backend)
    components = pca.components_.clone()
    state = pca.state_dict()
    other = StreamingPCA(K, backend=backend).load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    other.partial_fit(parts[1])
    pca.partial_fit(parts[1][:0])
    assert torch.equal(pca.components_, components)
    again = stream([parts[0], parts[1]], K, backend=backend)
    assert torch.equal(other.components_, again.components_)


@EVERY_BACKEND
def test_a_state_loads_into_auto_whatever_its_backend(stream, parts, backend):
    pca = stream([parts[0]], K, backend=backend)
    assert StreamingPCA(K).load_state_dict(pca.state_dict()).backend_ == backend


@EVERY_BACKEND
def test_a_state_that_is_not_whole_is_refused(stream, parts, backend):
    whole = stream([parts[0]], K, backend=backend).state_dict()
    for name in whole:
        part = {key: tensor for key, tensor in whole.items() if key != name}
        pca = StreamingPCA(K, backend=backend)
        with pytest.raises(EvaError, match=rf"not a state of StreamingPCA: ({re.escape(name)}|columns) missing"):
            pca.load_state_dict(part)
        assert not hasattr(pca, "components_"), "nothing may be loaded by halves"


def test_a_state_of_another_backend_is_refused(stream, parts):
    state = stream([parts[0]], K, backend="exact").state_dict()
    with pytest.raises(EvaError, match="is of backend 'exact', but this object was made with backend='incremental'"):
        StreamingPCA(K, backend="incremental").load_state_dict(state)


@EVERY_BACKEND
def test_a_state_of_other_settings_is_refused(stream, parts, backend):
    """Centred sums read as uncentred ones, or 6 kept components read as 12, would be wrong without a sign of it."""
    state = stream([parts[0]], K, backend=backend).state_dict()
    with pytest.raises(EvaError, match="center"):
        StreamingPCA(K, backend=backend, center=False).load_state_dict(state)
    if backend != "exact":  # which keeps all components, whatever was asked for
        with pytest.raises(EvaError, match="n_components"):
            StreamingPCA(20 * K, backend=backend).load_state_dict(state)
