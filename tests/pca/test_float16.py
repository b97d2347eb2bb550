"""Rows in float16: their products overflow or vanish in float16, so they are multiplied in a wider dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evatune import StreamingPCA

D, K = 320, 16


@pytest.mark.parametrize("largest", [6e4, 1e3, 1e-6])
@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16])
def test_large_and_tiny_numbers_are_measured_as_in_float64(known_rows, oracle, largest, backend, product_dtype):
    known = known_rows(2000, np.arange(1, D + 1) ** -0.5, mean=0.5, seed=0)
    rows = (known.rows * (largest / known.rows.abs().max())).half()
    assert rows.isfinite().all() and (rows != 0).double().mean() > 0.8
    truth = oracle(rows)
    pca = StreamingPCA(K, backend=backend, product_dtype=product_dtype)
    for batch in rows.split(250):
        pca.partial_fit(batch)
    assert pca.components_.dtype == torch.float32
    least = 0.99 if backend == "incremental" else 0.9999
    assert truth.captured_by(pca.components_, K) > least
    rtol = {"exact": 2e-3, "sketch": 1e-2, "incremental": 0.1}[backend]
    torch.testing.assert_close(pca.explained_variance_.double(), truth.eigenvalues[:K], rtol=rtol, atol=0)
    torch.testing.assert_close(pca.mean_.double(), truth.mean, rtol=0, atol=1e-4 * largest)
    assert pca.total_variance_ == pytest.approx(float(truth.variance.sum()), rel=1e-4)


def test_one_massive_feature_beside_small_ones(oracle):
    """As in trained models: one feature of 6e4, the others about 1."""
    rows = torch.randn(2000, D, generator=torch.Generator().manual_seed(0)) * torch.arange(1, D + 1) ** -0.5
    rows[:, 7] += 5e4 * (1 + 0.1 * torch.randn(2000, generator=torch.Generator().manual_seed(1)))
    rows = rows.clamp(max=6.5e4).half()
    truth = oracle(rows)
    pca = StreamingPCA(K, backend="exact", product_dtype=torch.bfloat16)
    for batch in rows.split(250):
        pca.partial_fit(batch)
    assert truth.captured_by(pca.components_, 1) > 1 - 1e-6
    rest = (pca.components_[1:].double() @ truth.components[1:].T).square() @ truth.eigenvalues[1:]
    assert float(rest.sum() / truth.eigenvalues[1:K].sum()) > 0.999
