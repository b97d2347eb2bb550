"""A sweep on a local Ray cluster of two workers, one of which is killed during a run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from evatune.compare.command import open_engine
from evatune.compare.loop import compare
from evatune.compare.sweep import Sweep
from evatune.errors import EvaError


def pids_of_tasks() -> list[int]:
    """Return the processes that run a task: Ray gives them its name as their title."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if b"ray::attempt" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_and_doubles_nothing(tiny_sweep, monkeypatch):
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        sweep = Sweep.load(tiny_sweep())
        engine = open_engine(sweep, engine="ray", workers=2, threads=1)
        assert engine.slots == 2
        finished, killed = engine.finished, []

        def kill_one_first():
            deadline = time.monotonic() + 60
            while not killed and time.monotonic() < deadline:
                for pid in pids_of_tasks()[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                time.sleep(0.2)
            return finished()

        monkeypatch.setattr(engine, "finished", kill_one_first)
        results = compare(sweep, engine)
    finally:
        ray.shutdown()
    lines = [json.loads(line) for line in (results.folder / "records.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "name" in line]  # the others are what runs share
    assert killed
    assert len(lines) == len({line["name"] for line in lines}) == 6
    assert {line["state"] for line in lines} == {"done"}
    assert sorted(line["tries"] for line in lines) == [1, 1, 1, 1, 1, 2]


@pytest.mark.slow
def test_a_run_of_several_processes_has_room_for_all_of_them(tiny_sweep):
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        sweep = Sweep.load(tiny_sweep(methods=["lora"], learning_rates=[1e-3]))
        engine = open_engine(sweep, engine="ray", threads=1, processes=2)
        assert engine.slots == 1
        results = compare(sweep, engine, limit=1)
        with pytest.raises(EvaError, match="a run needs 4 and 0; give fewer --threads"):
            open_engine(sweep, engine="ray", threads=2, processes=2)
    finally:
        ray.shutdown()
    (record,) = results.records.values()
    assert record["state"] == "done" and record["machine"]["processes"] == 2
