"""The shipped recipes say what the paper's Appendix D says."""

from __future__ import annotations

from pathlib import Path

import pytest

from evatune.recipe import load_recipe
from evatune.tasks.vision import vtab

PAPER = Path(__file__).parents[3] / "recipes" / "paper"


@pytest.mark.parametrize("name", ["dinov2-g14-vtab1k", "dinov2-g14-vtab1k-full"])
def test_appendix_d(name):
    recipe = load_recipe(PAPER / f"{name}.yaml")
    train, data = recipe.train, recipe.data
    assert (recipe.task, recipe.model.name) == ("vision", "facebook/dinov2-giant")
    assert (data.image_size, data.fit, data.normalization) == (224, "stretch", "imagenet")
    assert train.batch_size * train.gradient_accumulation == 64
    assert (train.epochs, train.schedule, train.weight_decay, train.precision) == (30, "cosine", 0.05, "bf16")
    assert train.warmup_ratio * train.epochs == pytest.approx(3)
    assert train.learning_rate in vtab.LEARNING_RATES
    if recipe.adapter.method == "full":
        assert train.layer_decay == 0.75
    else:
        assert recipe.adapter.rank in vtab.RANKS
        assert (recipe.adapter.target_modules, recipe.adapter.bias) == ("all-linear", "all")


def test_every_run_of_the_plan_fits_the_recipe():
    for run in vtab.plan_search(["dtd"])[:3] + vtab.plan_report({"pets": {"learning_rate": 1e-3, "rank": 2}}):
        recipe = load_recipe(PAPER / "dinov2-g14-vtab1k.yaml", run)
        assert recipe.data.validate is ("data.validate" in run)
        assert recipe.adapter.rank == run["adapter.rank"]
