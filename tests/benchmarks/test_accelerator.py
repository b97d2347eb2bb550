"""The script for accelerators on the tiny shape, on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tests.benchmarks.conftest import FOLDER

STARTS = ("evatune", "peft-eva", "pissa", "olora", "corda", "lora-ga")


def run(benchmark_script, monkeypatch, folder, *options):
    path = folder / "accelerator.json"
    sizes = ["--sizes", "2", "--length", "32", "--batches", "3", "--no-tests"]
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--device", "cpu", "--output", str(path), *sizes, *options])
    benchmark_script("accelerator").main()
    return json.loads(path.read_text())


def test_every_part_runs(benchmark_script, monkeypatch, tmp_path, capsys):
    results = run(benchmark_script, monkeypatch, tmp_path)
    assert not results["failed"] and not results["left_out"]
    assert results["model"] == {"parameters": 110_912, "dtype": "torch.float32", "attention": "sdpa"}
    found = results["passes"]["2"]
    names = {"bare", "lora step", "auto", "exact", "sketch", "auto, rank 16", "auto, rules", "auto, widest"}
    assert set(found) == names | {"auto, decomposed by the host"}
    assert set(results["factorizations"]) == {"12 x 64 x 64, device", "12 x 64 x 64, host"}
    assert set(results["operations"]) == {"rows, 64 x 64", "rows, 64 x 160", "12 x 64 x 64"}
    of_rows = results["operations"]["rows, 64 x 160"]
    assert of_rows["add"]["seconds"] > of_rows["shift"]["seconds"] > 0 and "Error" in of_rows["project, wider"]
    assert all(one["seconds"] > 0 for one in found.values()) and found["sketch"]["over_bare"] > 0
    assert set(results["beside"]) == set(STARTS)
    # PEFT passes the first batch once more before it measures, and then all of them if it measures anything.
    assert results["beside"]["peft-eva"]["passes"] == 1 + results["beside"]["evatune"]["passes"] == 5
    assert results["beside"]["pissa"]["whole"] == 2 * results["beside"]["pissa"]["seconds"]
    assert results["profile"]["host"][0]["ms"] > 0 and not results["profile"]["device"]
    assert "over bare" in capsys.readouterr().out


def test_what_does_not_fit_into_the_time_is_listed(benchmark_script, monkeypatch, tmp_path):
    results = run(benchmark_script, monkeypatch, tmp_path, "--minutes", "0")
    assert results["left_out"][:3] == ["the model", "PEFT", "2: bare"] and not results["passes"]


def test_a_part_that_fails_or_takes_too_long_ends_no_other(benchmark_script, monkeypatch, tmp_path):
    script = benchmark_script("accelerator")

    def begin(name, *args, **options):
        if name == "pissa":
            raise RuntimeError("out of memory")
        time.sleep(0.0 if name != "corda" else 30.0)

    monkeypatch.setattr(script, "begin", begin)
    results = run(benchmark_script, monkeypatch, tmp_path, "--part-seconds", "3")
    assert results["failed"] == {
        "pissa on 1 layers": "RuntimeError: out of memory",
        "corda on 1 layers": "TooLongError: not within 3 s",
    }
    assert {name for name, one in results["beside"].items() if "seconds" in one} == set(STARTS) - {"pissa", "corda"}
    assert "in begin" in results["tracebacks"]["pissa on 1 layers"]
    assert results["seconds"]["corda on 1 layers"] >= 3 > results["seconds"]["pissa on 1 layers"]


def test_sigterm_ends_the_part_that_runs_and_what_was_measured_is_kept(benchmark_script, monkeypatch, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def begin(name, *args, **options):
        if name == "peft-eva":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30.0)

    monkeypatch.setattr(benchmark_script("accelerator"), "begin", begin)
    results = run(benchmark_script, monkeypatch, tmp_path)
    assert results["failed"] == {"peft-eva on 1 layers": "TooLongError: told to end"}
    assert "seconds" in results["beside"]["evatune"] and "seconds" not in results["beside"]["peft-eva"]
    assert results["passes"]["2"]["auto"]["seconds"] > 0
    assert results["left_out"][0] == "pissa on 1 layers" and "2: sketch" in results["left_out"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_clock_starts_before_torch_is_imported(benchmark_script, monkeypatch):
    """Reading torch from disk for the first time may take a minute of the eight."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="torch") as raised:
        benchmark_script("accelerator")
    frame = next(one for one in raised.traceback if str(one.path).endswith("benchmarks/accelerator.py"))
    assert frame.locals["STARTED"] <= time.perf_counter()


def test_what_needs_a_package_that_is_missing_fails_alone(tmp_path):
    """As a program, in a process without PEFT that knows of evatune only what stands beside the script."""
    (tmp_path / "peft.py").write_text("raise ModuleNotFoundError(\"No module named 'peft'\")\n")
    command = [sys.executable, FOLDER / "accelerator.py", "--device", "cpu", "--output", tmp_path / "found.json"]
    options = ["--sizes", "2", "--length", "32", "--batches", "3", "--no-tests"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([*command, *options], env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "found.json").read_text())
    without = {"PEFT", "2: bare", *(f"{name} on 1 layers" for name in STARTS)}
    assert set(results["failed"]) == without, results["tracebacks"]
    assert "No module named 'peft'" in results["failed"]["2: bare"]
    assert {"bare", "auto", "auto, widest"} <= set(results["passes"]["2"]) and results["profile"]


def test_the_model_is_in_bfloat16_where_there_is_an_accelerator(benchmark_script):
    model = benchmark_script("accelerator").model_of("tiny", torch.device("meta"), num_hidden_layers=1, vocab_size=8)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.get_default_dtype() == torch.float32
    assert (len(model.model.layers), model.config.vocab_size) == (1, 8)


def test_an_accelerator_is_named(benchmark_script, monkeypatch):
    script = benchmark_script("accelerator")
    assert script.card(torch.device("cpu")) == {}
    found = SimpleNamespace(name="Card 1", total_memory=80e9, multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    card = script.card(torch.device("cuda"))
    assert (card["name"], card["memory_gb"], card["capability"]) == ("Card 1", 80, "9.0")


def test_a_package_that_is_missing_has_no_version(benchmark_script):
    assert set(benchmark_script("accelerator").installed("torch", "no-such-package")) == {"torch"}


def test_tests_that_do_not_end_are_told_as_far_as_they_came(benchmark_script, monkeypatch, tmp_path):
    script, output = benchmark_script("device_tests"), tmp_path / "found.tests.txt"
    monkeypatch.setattr(script, "TESTS", ("tests/test_hardware.py",))
    ended = script.run_tests("cpu", seconds=60, output=output)
    found = script.read_tests(output, ended=ended)
    assert "passed" in ended and found["passed"] > 0 and not found["failed"] and found["progress"] == ["[100%]"]
    assert script.run_tests("cpu", seconds=0.1, output=output) == "not within 0 s"


@pytest.mark.slow
@pytest.mark.parametrize("n_cores", [1, 4], ids=["one process", "two processes"])
def test_tests_that_do_not_end_tell_what_has_failed(benchmark_script, monkeypatch, tmp_path, n_cores):
    monkeypatch.setattr(os, "cpu_count", lambda: n_cores)
    script, path, output = benchmark_script("device_tests"), tmp_path / "test_some.py", tmp_path / "found.tests.txt"
    path.write_text(
        "import contextlib, time\n\n\ndef test_first():\n    assert 1 == 2\n\n\ndef test_second():\n"
        "    with contextlib.suppress(KeyboardInterrupt):\n        time.sleep(60)\n    time.sleep(60)\n"
    )
    monkeypatch.setattr(script, "TESTS", (str(path),))
    ended = script.run_tests("cpu", seconds=28, output=output)
    found = script.read_tests(output, ended=ended)
    assert ended == "not within 28 s" and any("test_first" in line for line in found["failed"])
    assert "assert 1 == 2" in output.read_text()
