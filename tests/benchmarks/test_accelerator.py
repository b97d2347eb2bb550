"""The script for accelerators on the tiny shape, on the CPU."""

from __future__ import annotations

import json
import sys
import time


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
    assert results["left_out"][:2] == ["the model", "2: bare"] and not results["passes"]


def test_a_part_that_fails_or_takes_too_long_ends_no_other(benchmark_script, monkeypatch, tmp_path):
    script = benchmark_script("accelerator")

    def rival(name, *args, **options):
        if name == "pissa":
            raise RuntimeError("out of memory")
        time.sleep(0.0 if name != "corda" else 30.0)

    monkeypatch.setattr(script, "rival", rival)
    results = run(benchmark_script, monkeypatch, tmp_path, "--part-seconds", "3")
    assert results["failed"] == {
        "pissa on 1 layers": "RuntimeError: out of memory",
        "corda on 1 layers": "TooLongError: not within 3 s",
    }
    assert set(results["beside"]) == {"evatune", "peft-eva", "olora", "lora-ga"}


def test_tests_that_do_not_end_are_told_as_far_as_they_came(benchmark_script, monkeypatch):
    script = benchmark_script("accelerator")
    monkeypatch.setattr(script, "TESTS", ("tests/test_hardware.py",))
    assert "passed" in script.run_tests("cpu", seconds=60)["ended"]
    assert script.run_tests("cpu", seconds=0.1)["ended"] == "not within 0 s"
