"""Count, mean and variance as sums about a shift."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import fake_device
from tests.on_device import TEST_DEVICE

from evatune import StreamingPCA
from evatune.pca.moments import Moments

PLENTY = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(params=["cpu", "fake"])
def device(request):
    """Return a device: accelerators sum rows in another way than the CPU."""
    if TEST_DEVICE != "cpu" or request.param == "cpu":
        yield torch.device(TEST_DEVICE)
    else:
        with fake_device.fake_device() as found:
            yield found


def moments_of(rows, shift):
    moments = Moments.around(shift)
    for batch in rows.split(17):
        moments = moments.with_rows(batch - shift)
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


@pytest.mark.parametrize("value", [0.1, -1e4 / 7, 12345.678])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_that_never_vary_have_no_variance(device, value, dtype):
    """Sums round, and on an accelerator in another way."""
    row = (value * torch.linspace(0.3, 1.7, 100, dtype=torch.float64)).to(dtype).to(device)
    moments = Moments.about(row.expand(333, 100), center=True)
    for n in (333, 50, 7):
        moments = moments.with_rows(moments.shifted(row.expand(n, 100), wanted=dtype))
    assert not moments.variance_d(center=True).cpu().any()


def test_sums_of_many_float32_rows_keep_their_digits():
    """10⁷ rows added one batch at a time: a float32 sum would stop growing at 2²⁴."""
    moments = Moments.around(torch.zeros(1))
    batch = torch.ones(1000, 1)
    for _ in range(30_000):
        moments = moments.with_rows(batch)
    assert moments.sum_d.dtype == torch.float64
    assert float(moments.sum_d) == moments.n_rows == 30_000_000
    assert float(moments.squares_d) == pytest.approx(30_000_000, rel=1e-6)  # an accelerator squares a norm


def half_rows(seed, n=200, mean=30.0):
    rows = random_rows(seed, n=n, d=300, mean=mean)
    return rows.to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 37, 5000])
def test_sums_are_as_precise_as_the_rows_whatever_their_dtype(device, dtype, n):
    rows = random_rows(3, n=n, d=7, mean=2.0).to(dtype)
    moments = Moments.around(torch.zeros(7, dtype=torch.promote_types(dtype, torch.float32), device=device))
    moments = moments.with_rows(rows.to(device))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    wide = rows.double()
    torch.testing.assert_close(moments.sum_d.cpu(), wide.sum(dim=0), rtol=tolerance, atol=tolerance * n)
    torch.testing.assert_close(moments.squares_d.cpu(), wide.square().sum(dim=0), rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("center", [True, False])
def test_rows_in_bfloat16_are_shifted_without_a_wider_copy(device, center):
    """The numbers are those of a wider difference that is rounded."""
    rows = half_rows(0).to(device)
    moments = Moments.about(rows[:20], center=center)
    narrow, wide = (moments.shifted(rows, wanted=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(narrow.cpu(), wide.to(torch.bfloat16).cpu())
    assert bool(moments.shift_d.cpu().any()) == center


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_about_a_shift_with_more_digits_are_not_shifted_in_bfloat16(dtype):
    rows = half_rows(0)
    first = rows[:20].to(dtype) * 1.001
    moments = Moments.about(first, center=True)
    moments = moments.with_rows(moments.shifted(first, wanted=dtype))
    wide = moments.shifted(rows, wanted=torch.bfloat16)
    assert wide.dtype == moments.shift_d.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(wide.double(), rows.double() - moments.shift_d.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 30.0, 300.0])
def test_mean_and_variance_of_rows_in_bfloat16_are_as_precise_as_their_entries(device, mean):
    """All entries of a feature may be rounded in the same direction when the shift is subtracted."""
    rows = half_rows(1, n=4000, mean=mean).to(device)
    pca = StreamingPCA(4, backend="sketch", product_dtype=torch.bfloat16, tolerance=None)
    for batch in rows.split(500):
        pca.partial_fit(batch)
    wide = rows.cpu().double()
    distance = (pca.mean_.cpu().double() - wide.mean(dim=0)).abs()
    assert bool((distance <= 2.0**-9 * (wide - wide.mean(dim=0)).abs().amax(dim=0)).all())
    assert float((distance / wide.std(dim=0)).median()) < 2.0**-9
    torch.testing.assert_close(pca.var_.cpu().double(), wide.var(dim=0), rtol=2.0**-9, atol=0.0)


def test_a_loaded_state_goes_on_bit_for_bit_with_rows_in_bfloat16(device):
    rows = half_rows(2, n=500, mean=0.0).to(device)
    made = [StreamingPCA(4, backend="sketch", product_dtype=torch.bfloat16, tolerance=None) for _ in range(2)]
    whole = made[0].partial_fit(rows[:200])
    loaded = made[1].load_state_dict(whole.state_dict())
    for batch in rows[200:].split(50):
        whole.partial_fit(batch)
        loaded.partial_fit(batch)
    for name in ("components_", "mean_", "var_"):
        assert torch.equal(getattr(whole, name).cpu(), getattr(loaded, name).cpu())
