"""The count of memory, on a tiny shape."""

from __future__ import annotations

import json

import pytest

from evatune.pca import many, together


@pytest.mark.on_cpu("it brings a device of its own")
def test_memory_is_counted_and_extrapolated(benchmark_script, monkeypatch, tmp_path):
    for module in (many, together):  # the script changes them
        monkeypatch.setattr(module, "ACCELERATOR_BYTES", together.ACCELERATOR_BYTES)
    script = benchmark_script("memory")
    script.main(["--shape", "tiny", "--layers", "1", "--length", "16", "--output", str(tmp_path / "memory.json")])
    found = json.loads((tmp_path / "memory.json").read_text())
    states = 4 * (3 * 64**2 + 160**2) / 2**20  # exact second moments, and beside them moments and components
    assert states < found["held_in_a_pass_mib"] <= found["held_at_a_check_mib"] < found["most_at_a_check_mib"]
    assert found["held_at_a_check_mib"] < 3 * states
    in_a_pass = 2 * found["held_in_a_pass_mib"] + found["beside_it_mib"]
    assert found["whole"]["in_a_pass_above_bare_mib"] == pytest.approx(in_a_pass)
