"""The count of memory, on a tiny shape."""

from __future__ import annotations

import json

import pytest
import torch

from evatune.pca import many, parking, together


@pytest.mark.on_cpu("it brings a device of its own")
def test_memory_is_counted_and_extrapolated(benchmark_script, monkeypatch, tmp_path):
    for module in (many, together):  # the script changes them
        monkeypatch.setattr(module, "ACCELERATOR_BYTES", together.ACCELERATOR_BYTES)
    monkeypatch.setattr(many, "STATES_BYTES", many.STATES_BYTES)
    monkeypatch.setattr(parking, "room_for", parking.room_for)
    script = benchmark_script("memory")
    script.main(["--shape", "tiny", "--layers", "1", "--length", "16", "--output", str(tmp_path / "memory.json")])
    found = json.loads((tmp_path / "memory.json").read_text())
    states = 4 * (3 * 64**2 + 160**2) / 2**20  # exact second moments, and beside them moments and components
    for name in ("narrow", "widest"):
        held = found[name]
        assert states < held["held_at_a_check_mib"] < min(held["most_at_a_check_mib"], held["held_in_a_pass_mib"])
        assert held["held_in_a_pass_mib"] < 3 * states
    in_a_pass = 2 * found["narrow"]["held_in_a_pass_mib"] + found["beside_it_mib"]
    assert found["whole"]["narrow"]["in_a_pass_above_bare_mib"] == pytest.approx(in_a_pass)


def test_what_waits_in_main_memory_is_not_counted(benchmark_script):
    matrix = torch.ones(3, 5, dtype=torch.bfloat16)
    there = benchmark_script("memory").uncounted(matrix)
    assert there.copy_(matrix).shape == (3, 5) and there.dtype == matrix.dtype and there.sum() == 15
