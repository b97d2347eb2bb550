"""Synthetic rows and their reference."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("width", [37, 64])
def test_the_rotation_is_orthogonal_and_mixes_all_features(benchmark_script, width):
    rotation = benchmark_script("synthetic").rotate(torch.eye(width, dtype=torch.float64), seed=3)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64))
    assert rotation.abs().max() < 5 / width**0.5
    assert rotation.abs().median() > 0.3 / width**0.5


def test_synthetic_rows_have_the_spectrum_and_a_mean(benchmark_script):
    rows = torch.cat(benchmark_script("synthetic").synthetic_batches(4, rows=5000, width=20)).double()
    values = torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)
    torch.testing.assert_close(values, 1 / torch.arange(1.0, 21.0).double(), rtol=0.1, atol=0)
    assert rows.mean(dim=0).norm() > rows.std(dim=0).norm()


def test_the_reference_counts_batches_as_often_as_they_were_seen(benchmark_script):
    batches = [torch.randn(7, 5, generator=torch.Generator().manual_seed(i)) + 3 for i in range(3)]
    seen = torch.cat([batches[0], batches[2], batches[0]]).double()
    expected = (seen - seen.mean(0)).T @ (seen - seen.mean(0))
    torch.testing.assert_close(benchmark_script("synthetic").scatter_matrix(batches, [0, 2, 0]), expected)
