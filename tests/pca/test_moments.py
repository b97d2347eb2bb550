"""Count, mean and variance as sums about a shift."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evatune.pca.moments import Moments

PLENTY = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def moments_of(rows, shift):
    moments = Moments.around(shift)
    for batch in rows.split(17):
        moments.update(batch - shift)
    return moments


def random_rows(seed, n=100, d=6, mean=10.0):
    generator = torch.Generator().manual_seed(seed)
    return mean * torch.randn(d, generator=generator, dtype=torch.float64) + torch.randn(
        n, d, generator=generator, dtype=torch.float64
    )


def assert_same(moments, rows):
    assert moments.n_rows == len(rows)
    torch.testing.assert_close(moments.mean_d, rows.mean(dim=0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moments.variance_d(center=True), rows.var(dim=0), rtol=1e-8, atol=1e-10)


@PLENTY
@given(seed=seeds, distance=st.sampled_from([0.0, 1.0, 100.0]))
def test_the_shift_does_not_show_in_mean_and_variance(seed, distance):
    rows = random_rows(seed)
    assert_same(moments_of(rows, rows[0] + distance), rows)


@PLENTY
@given(seed=seeds, at=st.integers(1, 99))
def test_merged_moments_are_those_of_all_rows(seed, at):
    rows = random_rows(seed)
    first, second = moments_of(rows[:at], rows[0]), moments_of(rows[at:], rows[-1] + 3)
    for merged in (first.merged(second), second.merged(first)):
        assert_same(merged, rows)
    assert torch.equal(first.merged(second).shift_d, rows[0])
    assert first.n_rows == at and second.n_rows == 100 - at, "neither operand changes"


@PLENTY
@given(seed=seeds)
def test_rebased_moments_describe_the_same_rows(seed):
    rows = random_rows(seed)
    moments = moments_of(rows, rows[0])
    away = moments.rebased(torch.zeros(6, dtype=torch.float64))
    assert_same(away, rows)
    torch.testing.assert_close(away.sum_d, rows.sum(dim=0))
    torch.testing.assert_close(away.squares_d, rows.square().sum(dim=0))
    torch.testing.assert_close(away.variance_d(center=False), rows.square().sum(dim=0) / 99)


def test_uncentred_variance_is_the_second_moment_about_the_shift():
    rows = random_rows(0)
    moments = moments_of(rows, torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(moments.variance_d(center=False), rows.square().sum(dim=0) / 99)


@pytest.mark.parametrize("n", [0, 1])
def test_less_than_two_rows_do_not_vary(n):
    moments = (
        moments_of(random_rows(0, n=n), torch.zeros(6, dtype=torch.float64)) if n else Moments.around(torch.zeros(6))
    )
    assert moments.n_rows == n
    assert torch.isfinite(moments.mean_d).all() and float(moments.variance_d(center=True).max()) < 1e-10


def test_sums_of_many_float32_rows_keep_their_digits():
    """10⁷ rows added one batch at a time: a float32 sum would stop growing at 2²⁴."""
    moments = Moments.around(torch.zeros(1))
    batch = torch.ones(1000, 1)
    for _ in range(30_000):
        moments.update(batch)
    assert moments.sum_d.dtype == torch.float64
    assert float(moments.sum_d) == float(moments.squares_d) == moments.n_rows == 30_000_000
