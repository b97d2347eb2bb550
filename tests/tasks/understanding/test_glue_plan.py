"""The paper's recipes and runs on GLUE say what Appendix C says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evatune.errors import EvaError
from evatune.recipe import load_recipe
from evatune.tasks.understanding import glue_plan
from evatune.tasks.understanding.glue import TASKS
from evatune.tasks.understanding.glue_plan import FIVE_SEEDS, LEARNING_RATES, TABLE_18, plan_best, plan_search

PAPER = Path(__file__).resolve().parents[3] / "recipes" / "paper"
HUB = {"roberta-large": "FacebookAI/roberta-large", "deberta-v3-base": "microsoft/deberta-v3-base"}


@pytest.mark.parametrize("model", TABLE_18)
def test_the_recipe_is_the_row_of_cola(model):
    recipe = load_recipe(PAPER / f"glue-{model}.yaml")
    assert (recipe.task, recipe.model.name, recipe.data.glue) == ("understanding", HUB[model], "cola")
    train, row = recipe.train, TABLE_18[model]["cola"]
    assert (train.batch_size, train.epochs, train.warmup_ratio) == (row.batch_size, row.epochs, 0.06)
    assert (recipe.adapter.rank, train.learning_rate) == row.best["eva"]
    assert (recipe.adapter.lora_alpha, recipe.data.max_length, train.schedule) == (1, 512, "linear")
    assert (recipe.measure.tau, recipe.measure.delta, recipe.measure.min_gain) == (0.99, 1, None)


@pytest.mark.parametrize("model", TABLE_18)
def test_the_best_runs_lie_in_the_search_and_fit_the_recipe(model):
    assert set(TABLE_18[model]) == set(TASKS)
    best = plan_best(model)
    assert len(best) == 2 * (len(FIVE_SEEDS) * 5 + 4 * 3)
    searched = [run | {"train.seed": 0} for method in ("lora", "eva") for run in plan_search(model, method=method)]
    assert all(run | {"train.seed": 0} in searched for run in best)
    for run in best[::5]:
        recipe = load_recipe(PAPER / f"glue-{model}.yaml", run)
        assert (recipe.data.glue, recipe.data.hub_config) == (run["data.glue"], run["data.glue"])
        assert recipe.train.learning_rate in LEARNING_RATES[model]


def test_every_method_is_searched_over_what_it_has():
    one = {"model": "roberta-large", "tasks": ["rte"]}
    assert {run["adapter.rank"] for run in plan_search(**one, method="adalora")} == {2, 4, 6, 8, 16}
    boft = plan_search(**one, method="boft")
    assert {run["adapter.block_size"] for run in boft} == {2, 4, 8, 16}
    assert len(boft) == 4 * 3
    assert "adapter.rank" not in boft[0]
    assert len(plan_search(**one, method="full")) == 3
    with pytest.raises(EvaError, match="Table 18 has the best settings of lora and eva, not of boft: search for them"):
        plan_best("roberta-large", method="boft")


def test_the_command_prints_lines_of_json(capsys):
    glue_plan.main(["best", "--model", "deberta-v3-base", "--method", "eva", "--tasks", "qnli"])
    runs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [run["train.seed"] for run in runs] == [0, 1, 2]
    assert {(run["adapter.rank"], run["train.batch_size"], run["train.epochs"]) for run in runs} == {(16, 64, 25)}
    with pytest.raises(SystemExit):
        glue_plan.main(["best", "--method", "dora"])
    assert "not of dora: search for them" in capsys.readouterr().err
