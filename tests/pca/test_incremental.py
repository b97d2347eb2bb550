"""The reference backend against scikit-learn's implementation of the same algorithm, batch by batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import IncrementalPCA

from evatune import StreamingPCA

FALLING = 0.9 ** np.arange(40)


@pytest.mark.parametrize("seed", [0, 1, 99])
@pytest.mark.parametrize("sizes", [(50,), (30, 7, 120), (200, 1), (20, 20, 3, 90)])
@pytest.mark.parametrize("mean", [0.0, 5.0, 1e4])
def test_every_step_equals_that_of_scikit_learn(known_rows, sizes, mean, seed):
    known = known_rows(300, FALLING, mean=mean, seed=seed)
    ours, theirs = StreamingPCA(12, backend="incremental"), IncrementalPCA(12)
    for batch in known.batches(*sizes):
        ours.partial_fit(batch)
        theirs.partial_fit(batch.numpy())
        cosines = (ours.components_ * torch.tensor(theirs.components_)).sum(dim=1).abs()
        assert (cosines > 1 - 1e-6).all()
        for name in ("singular_values_", "explained_variance_", "explained_variance_ratio_"):
            torch.testing.assert_close(
                getattr(ours, name), torch.tensor(getattr(theirs, name)), rtol=1e-6, atol=0, msg=name
            )
        torch.testing.assert_close(ours.mean_, torch.tensor(theirs.mean_), rtol=1e-12, atol=1e-12)
        n = ours.n_samples_seen_
        assert n == int(theirs.n_samples_seen_)
        if n > 1:  # theirs has n in the denominator
            torch.testing.assert_close(ours.var_ * (n - 1) / n, torch.tensor(theirs.var_), rtol=1e-6, atol=0)


def test_the_mean_correction_is_needed(known_rows, oracle):
    """Batches with means of their own: what lies between the batches is variance too."""
    parts = [known_rows(100, FALLING, mean=0.0, seed=i).rows for i in range(4)]
    direction = torch.zeros(40).double()
    direction[0] = 1.0
    rows = [part + 30.0 * i * direction for i, part in enumerate(parts)]
    pca = StreamingPCA(12, backend="incremental")
    for part in rows:
        pca.partial_fit(part)
    truth = oracle(torch.cat(rows))
    assert float(pca.components_[0] @ direction) > 0.999
    assert float(pca.explained_variance_[0]) == pytest.approx(float(truth.eigenvalues[0]), rel=1e-4)


def test_it_keeps_no_more_than_was_asked_for(known_rows):
    pca = StreamingPCA(12, backend="incremental")
    for batch in known_rows(300, FALLING, seed=0).batches(50):
        pca.partial_fit(batch)
        assert pca.state_dict()["components"].shape == (12, 40)
