from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from evatune.compare.engine import Job, Outcome
from evatune.compare.sweep import Sweep


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe whose files need not be there, since no engine of these tests trains."""
    path = tmp_path / "task.yaml"
    path.write_text("model: none/such\ndata: {train: train.jsonl, eval: test.jsonl}\nadapter: {rank: 4}\n")
    return path


@pytest.fixture
def sweep(recipe_file: Path, tmp_path: Path) -> Callable[..., Sweep]:
    """Return a function that writes a sweep file, with the given keys changed, and reads it."""

    def build(**changed: Any) -> Sweep:
        content = {
            "recipes": {"task": recipe_file.name},
            "methods": ["lora", "eva"],
            "learning_rates": [1e-3, 1e-2, 1e-1],
            "validation": {"eval": "validation.jsonl"},
            "test": {"seeds": 2},
            "output": "results",
        } | changed
        content = {key: value for key, value in content.items() if value is not None}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return Sweep.load(path)

    return build


class FakeEngine:
    """Writes what a run would have written, with scores that a function gives.

    Args:
        score: is given the job's run, and returns a number, or the state and the reason of a run without one.
        slots: runs at a time.
    """

    def __init__(self, score: Callable[[Any], Any], *, slots: int = 1) -> None:
        self.score, self.slots, self.threads = score, slots, 1
        self.started: list[Job] = []
        self.waiting: list[Job] = []
        self.closed = False

    def start(self, job: Job) -> None:
        self.started.append(job)
        self.waiting.append(job)
        assert len(self.waiting) <= self.slots

    def finished(self) -> list[tuple[Job, Outcome]]:
        job = self.waiting.pop(0)
        score = self.score(job.run)
        if isinstance(score, tuple):
            return [(job, Outcome(state=score[0], reason=score[1]))]
        write_run(job, score)
        return [(job, Outcome(state="done"))]

    def close(self) -> None:
        self.closed = True

    @property
    def names(self) -> list[str]:
        return [job.run.name for job in self.started]


def write_run(job: Job, value: float | None) -> None:
    """Write the folder of a run that scored this accuracy; None is one that is not finite."""
    (job.folder / "adapter").mkdir(parents=True)
    (job.folder / "adapter" / "weights").write_text("x")
    if job.run.spectra_key and job.recipe["measure"]["spectra"] is None:
        (job.folder / "spectra").mkdir()
    scores = {
        "headline": "accuracy",
        "metrics": {"accuracy": value, "loss": None if value is None else 1 - value},
        "intervals": {},
    }
    record = {
        "recipe": job.recipe,
        "log": [{"step": 1, "loss": 0.123456789, "learning_rate": 0.01, "epoch": 0.5}],
        "before": scores,
        "after": scores,
        "parameters": {"trainable": 12},
        "versions": {"evatune": "0.1.0"},
        "seconds": {"prepare": 0.5, "train": 1.0},
    }
    (job.folder / "run.json").write_text(json.dumps(record))
    (job.folder / "after.json").write_text(json.dumps(scores | {"outcomes": {"right": [1.0, 0.0, 0.123456]}}))


@pytest.fixture
def fake_engine() -> type[FakeEngine]:
    return FakeEngine


def interrupt(path: Path, *options: str, patience: float) -> Path:
    """Run `tiny/lora/lr0.001-seed0` from the command line, press Ctrl-C in its training, and return its folder.

    Ctrl-C in a terminal reaches the whole group of processes; the run in progress saves its checkpoint.
    """
    folder = Path(Sweep.load(path).output)
    command = [sys.executable, "-m", "evatune", "compare", str(path), "--threads", "1", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    run = folder / "runs" / "tiny" / "lora" / "lr0.001-seed0"
    log = run / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(patience) == 130
    assert list(run.glob("checkpoints/checkpoint-*/checksums.json"))
    assert not (folder / "records.jsonl").exists()
    return run


@pytest.fixture
def interrupted() -> Callable[..., Path]:
    """The function `interrupt`."""
    return interrupt


@pytest.fixture
def tiny_sweep(tiny_model, tiny_data, tmp_path):
    """Return a function that writes a sweep over a tiny model."""
    recipe = {
        "model": str(tiny_model),
        "data": {"train": str(tiny_data / "train.jsonl"), "eval": str(tiny_data / "test.jsonl")},
        "adapter": {"rank": 2},
        "measure": {"max_batches": 2},
        "train": {"steps": 2, "batch_size": 4, "precision": "fp32"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))

    def build(**changed) -> Path:
        content = {
            "recipes": "tiny.yaml",
            "methods": ["eva", "lora"],
            "learning_rates": [1e-3, 1e-2],
            "validation": {"max_eval_examples": 8},
            "test": {"seeds": 1},
            "widen": 0,
        } | changed
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return build
