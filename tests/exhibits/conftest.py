from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

METHODS = {"lora": 0.70, "eva ρ=1": 0.80, "eva ρ=2": 0.78, "pissa": 0.60}
"""Mean accuracy of each method on the first task."""


def record(task: str, method: str, seed: int, *, metric: str, value: float, rng: np.random.Generator) -> dict[str, Any]:
    right = (np.arange(50) < round(50 * value)).astype(float)
    outcomes = {"right": right.tolist()} if metric == "accuracy" else {"loss": (right * 2).tolist()}
    value = float(np.mean(next(iter(outcomes.values()))))
    loss = METHODS["lora"] / METHODS[method]
    return {
        "name": f"{task}/{method}/lr0.01-seed{seed}",
        "state": "done",
        "stage": "test",
        "task": task,
        "model": "",
        "method": method,
        "point": {"train.learning_rate": 0.01},
        "seed": seed,
        "tries": 1,
        "wall_seconds": 2.0,
        "versions": {"evatune": "0.1.0"},
        "recipe": {
            "adapter": {
                "method": method.split()[0],
                "rho": float(method[-1]) if "ρ" in method else 2.0,
                "lora_alpha": 1.0,
                "rank": 4,
            },
            "measure": {"spectra": None},
        },
        "parameters": {"trainable": 1000 if method == "lora" else 900},
        "seconds": {"measure": 1.0, "prepare": 0.5, "train": 6.0}
        if "eva" in method
        else {"prepare": 0.5, "train": 6.0},
        "peak_memory_gib": 1.5,
        "first_grad_norm": 0.1 if method == "lora" else 0.9,
        "before": {"headline": metric, "metrics": {metric: 0.5 if metric == "accuracy" else 2.0}},
        "after": {"headline": metric, "metrics": {metric: value}, "outcomes": outcomes},
        "log": [{"step": step, "loss": loss * 2.0 / step, "grad_norm": loss / step} for step in range(1, 21)],
    }


@pytest.fixture
def results(tmp_path: Path):
    """Return a function that writes a folder of results: tasks by metric, seeds, and methods that were refused."""

    def write(
        tasks: dict[str, str] | None = None, *, seeds: int = 3, refused: str = "corda", name: str = "results"
    ) -> Path:
        rng = np.random.default_rng(0)
        records, choices = [], []
        for task, metric in (tasks or {"sst2": "accuracy", "cola": "accuracy"}).items():
            for method, value in METHODS.items():
                for seed in range(seeds):
                    score = value + 0.02 * seed
                    score = 1 - score if metric == "loss" else score
                    records.append(record(task, method, seed, metric=metric, value=score, rng=rng))
                choices.append(choice(task, method, seeds))
            if refused:
                records.append(
                    records[-1]
                    | {"name": f"{task}/{refused}/x", "method": refused, "state": "refused", "stage": "validation"}
                    | {"reason": "this task has no such layers.", "after": None}
                )
                choices.append(choice(task, refused, seeds) | {"point": None, "curve": [], "open": []})
        folder = tmp_path / name
        folder.mkdir()
        (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
        (folder / "choices.json").write_text(json.dumps(choices), encoding="utf-8")
        return folder

    return write


def choice(task: str, method: str, seeds: int) -> dict[str, Any]:
    curve = [[{"train.learning_rate": rate}, value] for rate, value in ((1e-3, 0.5), (1e-2, 0.9))]
    return {
        "task": task,
        "model": "",
        "method": method,
        "point": {"train.learning_rate": 0.01},
        "open": ["train.learning_rate"] if method == "pissa" else [],
        "curve": curve,
        "missing": 0,
        "test_seeds": seeds,
    }
