"""Golden values: what `compare` takes for equal."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def values():
    return {f"llama measured/spectra {way}/q_proj/mean": torch.arange(1.0, 5.0) for way in ("auto", "sketch")}


def test_equal_bits_are_one_row_a_case(benchmark_script, values):
    report, n_different = benchmark_script("golden").compare(values, {name: v.clone() for name, v in values.items()})
    assert n_different == 0
    assert [line.split() for line in report.splitlines()[2:]] == [["llama", "measured", "2", "2", "equal"]]


def test_the_last_bit_counts_and_is_measured(benchmark_script, values):
    new = {name: value.clone() for name, value in values.items()}
    changed = "llama measured/spectra sketch/q_proj/mean"
    new[changed][3] = torch.nextafter(new[changed][3], torch.tensor(9.0))
    report, n_different = benchmark_script("golden").compare(values, new)
    assert n_different == 1
    assert "1.2e-07" in report
    assert "llama measured · spectra sketch" in report
    assert "llama measured · spectra auto" not in report


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda value: value[:3], lambda value: value * float("nan")])
def test_another_type_or_shape_or_nan_is_a_difference(benchmark_script, values, change):
    new = dict(values) | {"llama measured/spectra auto/q_proj/mean": change(torch.arange(1.0, 5.0))}
    assert benchmark_script("golden").compare(values, new)[1] == 1


def test_a_value_on_one_side_only_is_a_difference(benchmark_script, values):
    new = {name: value for name, value in values.items() if "auto" in name} | {"more/x": torch.zeros(1)}
    report, n_different = benchmark_script("golden").compare(values, new)
    assert n_different == 2
    assert "missing  llama measured/spectra sketch" in report
    assert "more/x" in report


def test_the_same_commit_gives_the_same_bits(benchmark_script):
    golden = benchmark_script("golden")
    once, again = (dict(golden.measured("llama")) for _ in range(2))
    assert len(once) > 200
    assert golden.compare(once, again)[1] == 0
