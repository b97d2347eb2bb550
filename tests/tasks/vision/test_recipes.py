"""The shipped recipes say what the paper's Appendix D says."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from evatune.compare.runs import cells, points, runs_of
from evatune.compare.sweep import Sweep
from evatune.recipe import load_recipe
from evatune.tasks.vision import vtab
from evatune.training import finetune
from evatune.training.setup import open_recipe

ROOT = Path(__file__).resolve().parents[3]
RATES, RANKS = (2.5e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4), (2, 4, 8, 16)
PAPER, SMALL = ROOT / "recipes" / "paper", ROOT / "recipes" / "small"


@pytest.mark.parametrize("name", ["dinov2-g14-vtab1k", "dinov2-g14-vtab1k-full"])
def test_appendix_d(name):
    recipe = load_recipe(PAPER / f"{name}.yaml")
    train, data = recipe.train, recipe.data
    assert (recipe.task, recipe.model.name) == ("vision", "facebook/dinov2-giant")
    assert (data.image_size, data.fit, data.normalization) == (224, "stretch", "imagenet")
    assert train.batch_size * train.gradient_accumulation == 64
    assert (train.epochs, train.schedule, train.weight_decay, train.precision) == (30, "cosine", 0.05, "bf16")
    assert train.warmup_ratio * train.epochs == pytest.approx(3)
    assert train.learning_rate in RATES
    if recipe.adapter.method == "full":
        assert train.layer_decay == 0.75
    else:
        assert recipe.adapter.rank in RANKS
        assert (recipe.adapter.target_modules, recipe.adapter.bias) == ("all-linear", "all")


def test_the_sweep_is_the_protocol():
    compared = cells(Sweep.load(ROOT / "sweeps" / "paper" / "vtab1k.yaml"))
    assert {cell.task.name: cell.task.group for cell in compared} == {n: t.group for n, t in vtab.TASKS.items()}
    of_eva = [cell for cell in compared if cell.label == "eva"]
    pairs = [(cell, point) for cell in of_eva for point in points(cell.contender.grid)]
    search = [run for cell, point in pairs for run in runs_of(cell, "validation", point)]
    report = [run for cell in of_eva for run in runs_of(cell, "test", {})]
    assert (len(search), len(report)) == (1140, 95)
    assert {(run.recipe.train.learning_rate, run.recipe.adapter.rank) for run in search} == {*product(RATES, RANKS)}
    assert all(run.recipe.data.train == (f"vtab:{run.name.split('/')[0]}",) for run in search + report)
    assert all(run.recipe.data.validate for run in search) and not any(run.recipe.data.validate for run in report)
    full = [runs_of(cell, "test", {})[0].recipe for cell in compared if cell.label == "full"]
    assert {recipe.train.layer_decay for recipe in full} == {0.75}


def test_the_real_pictures_of_cifar10(real_data):
    real_data("cifar10")
    task = open_recipe(load_recipe(SMALL / "vit-cifar10.yaml", {"image_size": 32}))
    facts = task.facts()
    assert (facts["train"], facts["held_out"]) == (1000, 2000)
    assert facts["classes"]["airplane"] == 100
    assert (len(facts["classes"]), facts["skipped"], facts["converted"]) == (10, {}, {})


@pytest.mark.slow
def test_a_real_model_learns_digits(real_data, tmp_path):
    short = {
        "model": str(real_data("../models/vit-s14-saliency")),
        "steps": 40,
        "max_batches": 4,
        "output": str(tmp_path / "run"),
    }
    record = finetune(load_recipe(SMALL / "vit-digits.yaml", short), progress=False)
    assert record.before["metrics"]["accuracy"] < 0.3
    assert record.after["metrics"]["accuracy"] > 0.8
