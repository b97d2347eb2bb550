"""Runs of two processes on the CPU: the same results, the run's own sentence where it is wrong, and none is lost."""

from __future__ import annotations

import contextlib
import threading
import time

import psutil
import pytest

from evatune.compare.command import open_engine
from evatune.compare.loop import compare
from evatune.compare.sweep import Sweep

pytestmark = pytest.mark.slow


def members() -> list[psutil.Process]:
    """Return the processes of a run, without their launcher: their environment has a number."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "LOCAL_RANK" in process.environ():
                found.append(process)
    return found


def test_two_processes_score_as_one_does(tiny_sweep, tmp_path):
    path = tiny_sweep(methods=["eva"], learning_rates=[1e-3])
    found = {}
    for processes in (1, 2):
        sweep = Sweep.load(path)
        object.__setattr__(sweep, "output", str(tmp_path / f"results-{processes}"))
        engine = open_engine(sweep, workers=1, threads=1, processes=processes)
        found[processes] = compare(sweep, engine, limit=1).records["tiny/eva/lr0.001-seed0"]
    one, two = found[1], found[2]
    assert (one["state"], two["state"]) == ("done", "done")
    assert (one["machine"]["processes"], two["machine"]["processes"]) == (1, 2)
    assert two["after"]["metrics"] == pytest.approx(one["after"]["metrics"], rel=1e-4)
    assert two["log"] == [pytest.approx(entry, rel=1e-3) for entry in one["log"]]
    assert two["parameters"] == one["parameters"]


def test_what_the_run_says_is_in_its_record(tiny_sweep):
    path = tiny_sweep(methods=["lora"], learning_rates=[1e-3], settings={"train.batch_size": 3})
    sweep = Sweep.load(path)
    results = compare(sweep, open_engine(sweep, workers=1, threads=1, processes=2))
    (record,) = results.records.values()
    assert record["state"] == "refused"
    assert record["reason"].startswith("train.batch_size is 3, which 2 processes cannot share equally")


def test_a_run_one_of_whose_processes_is_killed_is_started_again(tiny_sweep, monkeypatch):
    sweep = Sweep.load(tiny_sweep(methods=["lora"], learning_rates=[1e-3]))
    engine = open_engine(sweep, workers=1, threads=1, processes=2)
    killed: list[int] = []

    def kill_one() -> None:
        while not killed:
            time.sleep(0.05)
            for process in members()[-1:]:
                killed.append(process.pid)
                process.kill()

    watch = threading.Thread(target=kill_one)
    watch.start()
    results = compare(sweep, engine, limit=1)
    watch.join()
    (record,) = results.records.values()
    assert (record["state"], record["tries"]) == ("done", 2)


def test_an_interrupted_run_of_two_processes_saves_a_checkpoint(tiny_sweep, interrupted):
    path = tiny_sweep(methods=["lora"], learning_rates=[1e-3], settings={"steps": 20000})
    interrupted(path, "--processes", "2", patience=90)
    assert not members()
