"""Worker processes that train tiny models: results, a worker that is killed, and going on after an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evatune.cli.main import main
from evatune.compare.command import open_engine
from evatune.compare.local import gpu_names, gpus_of
from evatune.compare.loop import compare
from evatune.compare.results import Results
from evatune.compare.standing import standings
from evatune.compare.sweep import Sweep
from evatune.errors import EvaError


@pytest.mark.slow
def test_workers_do_the_runs_of_a_sweep_and_a_killed_one_loses_nothing(tiny_sweep, monkeypatch):
    """Two workers, one of which is killed in its first run: the run is done again, nothing is lost or doubled."""
    sweep = Sweep.load(tiny_sweep())
    engine = open_engine(sweep, workers=2, threads=1)
    start, killed = engine.start, []

    def start_and_kill(job):
        start(job)
        if not killed:
            killed.append(job.run.name)
            process, _ = next(iter(engine._workers.values()))
            os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(engine, "start", start_and_kill)
    results = compare(sweep, engine)
    lines = [json.loads(line) for line in (results.folder / "records.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "name" in line]  # the others are what runs share
    assert len(lines) == len({line["name"] for line in lines}) == 6
    assert {line["state"] for line in lines} == {"done"}
    assert results.records[killed[0]]["tries"] == 2
    record = results.records["tiny/eva/lr0.001-seed1000"]
    assert record["fingerprints"].keys() == {"model", "data", "code"} and record["peak_memory_gib"] > 0
    assert record["machine"]["threads"] == 1
    assert len(list((results.folder / "spectra").iterdir())) == 2  # of both seeds
    assert all(row.mean is not None for row in standings(results).rows)
    assert not list((results.folder / "runs").rglob("*.safetensors"))


def test_the_command_tells_what_is_left_and_how_methods_stand(tiny_sweep, capsys):
    path = str(tiny_sweep(methods=["lora"], learning_rates=[1e-2, 1e-3]))
    assert main(["compare", path, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "time unknown: no run of some task has been measured yet" in text
    assert main(["compare", path, "--threads", "1"]) == 0
    assert "one seed, so no interval: all" in capsys.readouterr().out
    assert main(["compare", path, "--dry-run", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["runs"][0]["done"] == 3 and content["runs"][0]["left"] == 0 and content["seconds"] == 0


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(tiny_sweep):
    """A process of its own gets SIGTERM, as a cluster's scheduler sends it, after its first record."""
    path = tiny_sweep(methods=["lora"])
    folder = Path(Sweep.load(path).output)
    command = [sys.executable, "-m", "evatune", "compare", str(path), "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "records.jsonl").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    before = Results(folder).records
    assert 1 <= len(before) < 3
    results = compare(Sweep.load(path), open_engine(Sweep.load(path), workers=1, threads=1))
    assert len(results.records) == 3
    assert all(results.records[name] == record for name, record in before.items())


def test_numbers_of_workers_that_make_no_sense_are_refused(tiny_sweep):
    with pytest.raises(EvaError, match=r"^workers is 0, but must be at least 1"):
        open_engine(Sweep.load(tiny_sweep()), workers=0, threads=None)


def test_more_gpus_than_are_visible_are_refused(tiny_sweep, monkeypatch):
    sweep = Sweep.load(tiny_sweep())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(EvaError, match="--gpus is 2, but CUDA_VISIBLE_DEVICES=3 names 1; give --gpus 1, or name more"):
        open_engine(sweep, workers=2, threads=1, gpus=2)
    assert gpu_names(1) == ["3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_names(0) == []
    with pytest.raises(EvaError, match="CUDA_VISIBLE_DEVICES= names 0; give --gpus 0"):
        gpu_names(1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu_names(2) == ["0", "1"]


def test_each_process_of_a_run_has_a_gpu_of_its_own(tiny_sweep, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpus_of(worker, ["4", "5", "6", "7"], 2) for worker in range(3)] == [["4", "5"], ["6", "7"], ["4", "5"]]
    assert gpus_of(3, ["4", "5", "6", "7", "8"], 2) == ["6", "7"]
    sweep = Sweep.load(tiny_sweep())
    assert open_engine(sweep, gpus=4, processes=2).processes == 2
    assert [open_engine(sweep, gpus=4, processes=n).slots for n in (1, 2, 3)] == [4, 2, 1]
    assert open_engine(sweep).slots == 1 and open_engine(sweep, gpus=4, workers=1).slots == 1
    with pytest.raises(EvaError, match=r"--gpus is 2 and --processes 4, .*; give --processes 2, or other --gpus"):
        open_engine(sweep, gpus=2, processes=4)
    with pytest.raises(EvaError, match="--gpus is 2 and --processes 1"):
        open_engine(sweep, engine="ray", gpus=2)
    with pytest.raises(EvaError, match=r"^processes is 0, but must be at least 1"):
        open_engine(sweep, processes=0)


def test_ray_is_asked_for_where_it_is_missing(tiny_sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EvaError, match=r"--engine ray needs the Python package ray; run: pip install 'evatune\[ray\]'"):
        open_engine(Sweep.load(tiny_sweep()), engine="ray")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_its_checkpoint(tiny_sweep, interrupted):
    path = tiny_sweep(methods=["lora"], learning_rates=[1e-3], settings={"steps": 1500})
    checkpoint = next(interrupted(path, patience=60).glob("checkpoints/checkpoint-*"))
    sweep = Sweep.load(path)
    (record,) = compare(sweep, open_engine(sweep, workers=1, threads=1), limit=1).records.values()
    assert (record["state"], record["steps"]) == ("done", 1500)
    assert record["resumed_from"] == int(checkpoint.name.removeprefix("checkpoint-")) > 0
