"""The exact backend: products in half precision where the numbers allow it; rough and final eigenpairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evatune import StreamingPCA

D, K = 320, 16


def in_half_precision(batches, **settings):
    pca = StreamingPCA(K, backend="exact", product_dtype=torch.bfloat16, **settings)
    for batch in batches:
        pca.partial_fit(batch)
    return pca


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_products_in_bfloat16_are_good_enough_where_no_direction_dominates(known_rows, oracle, seed, dtype):
    rows = known_rows(2000, np.arange(1, D + 1) ** -0.5, mean=3.0, seed=seed).rows.to(dtype)
    truth = oracle(rows)
    pca = in_half_precision(rows.split(250))
    assert not pca._state.needs_full_precision
    assert truth.captured_by(pca.components_, K) > 1 - 2e-5
    torch.testing.assert_close(pca.explained_variance_.double(), truth.eigenvalues[:K], rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_products_stay_in_full_precision_where_massive_activations_own_the_variance(known_rows, oracle, seed, dtype):
    rows = known_rows(2000, np.concatenate([[300.0], np.arange(1, D) ** -0.5]), mean=3.0, seed=seed).rows.to(dtype)
    truth = oracle(rows)
    pca = in_half_precision(rows.split(250))
    assert pca._state.needs_full_precision
    rest = (pca.components_[1:].double() @ truth.components[1:].T).square() @ truth.eigenvalues[1:]
    assert float(rest.sum() / truth.eigenvalues[1:K].sum()) > 1 - 1e-4


def test_rows_become_massive_later(known_rows, oracle):
    """What the first batch allowed is decided again whenever the rows have doubled."""
    flat = known_rows(1000, np.arange(1, D + 1) ** -0.5, seed=0)
    massive = known_rows(4000, np.concatenate([[300.0], np.arange(1, D) ** -0.5]), seed=1)
    pca = in_half_precision(batch.float() for batch in [*flat.batches(250), *massive.batches(500)])
    assert pca._state.needs_full_precision


def test_a_look_is_good_enough_to_watch_and_reading_components_is_always_thorough(known_rows, oracle):
    known = known_rows(2000, np.arange(1, D + 1) ** -0.3, seed=0)
    batches = known.batches(250)
    pca = StreamingPCA(K, backend="exact")
    for batch in batches:
        snapshot = pca.partial_fit(batch).snapshot()
    truth = oracle(known.rows)
    rough = 1 - truth.captured_by(snapshot.components, K)
    thorough = 1 - truth.captured_by(pca.components_, K)
    assert thorough < 1e-9 < rough < 0.02
    assert torch.equal(pca.snapshot().components, snapshot.components), "a thorough read changes no snapshot"
    torch.testing.assert_close(snapshot.explained_variance, pca.explained_variance_, rtol=0.02, atol=0)
    never_asked = StreamingPCA(K, backend="exact")
    for batch in batches:
        never_asked.partial_fit(batch)
    torch.testing.assert_close(never_asked.components_, pca.components_, rtol=0, atol=1e-6)


def test_the_exact_backend_misses_nothing(known_rows):
    pca = StreamingPCA(K, backend="exact").partial_fit(known_rows(600, np.arange(1, D + 1) ** -0.5).rows)
    assert pca.captured_error_ == 0.0
