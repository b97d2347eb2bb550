"""The script for accelerators on the tiny shape, on the CPU."""

from __future__ import annotations

import json
import sys


def run(benchmark_script, monkeypatch, folder, *options):
    path = folder / "accelerator.json"
    sizes = ["--sizes", "2", "--length", "32", "--batches", "3", "--no-tests"]
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--device", "cpu", "--output", str(path), *sizes, *options])
    benchmark_script("accelerator").main()
    return json.loads(path.read_text())


def test_every_part_runs(benchmark_script, monkeypatch, tmp_path, capsys):
    results = run(benchmark_script, monkeypatch, tmp_path)
    assert not results["failed"] and not results["left_out"]
    found = results["passes"]["2"]
    assert set(found) == {"bare", "lora step", "auto", "exact", "sketch", "auto, rank 16"}
    assert all(one["seconds"] > 0 for one in found.values()) and found["sketch"]["over_bare"] > 0
    assert set(results["beside"]) == {"evatune", "peft-eva", "pissa", "olora", "corda", "lora-ga"}
    assert results["beside"]["pissa"]["whole"] == 2 * results["beside"]["pissa"]["seconds"]
    assert results["profile"][0]["ms"] > 0
    assert "over bare" in capsys.readouterr().out


def test_what_does_not_fit_into_the_time_is_listed(benchmark_script, monkeypatch, tmp_path):
    results = run(benchmark_script, monkeypatch, tmp_path, "--minutes", "0")
    assert results["left_out"][0] == "passes of 2" and "passes" not in results
