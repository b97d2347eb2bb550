"""The paper's recipes, runs and sweeps on GLUE say what Appendix C says."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from evatune.compare.runs import cells, points, runs_of
from evatune.compare.sweep import Sweep
from evatune.errors import EvaError
from evatune.recipe import load_recipe
from evatune.tasks.understanding import table18
from evatune.tasks.understanding.glue import TASKS
from evatune.tasks.understanding.table18 import FIVE_SEEDS, TABLE_18, runs

ROOT = Path(__file__).resolve().parents[3]
PAPER = ROOT / "recipes" / "paper"
HUB = {"roberta-large": "FacebookAI/roberta-large", "deberta-v3-base": "microsoft/deberta-v3-base"}
RATES = {"roberta-large": {1e-3, 4e-4, 1e-4}, "deberta-v3-base": {4e-3, 1e-3, 4e-4}}


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
def test_the_best_runs_fit_the_recipe(model):
    assert set(TABLE_18[model]) == set(TASKS)
    best = runs(model)
    assert len(best) == 2 * (len(FIVE_SEEDS) * 5 + 4 * 3)
    for run in best[::5]:
        recipe = load_recipe(PAPER / f"glue-{model}.yaml", run)
        assert (recipe.data.glue, recipe.data.hub_config) == (run["data.glue"], run["data.glue"])
        assert (recipe.adapter.method, recipe.adapter.rank) == (run["adapter.method"], run["adapter.rank"])


@pytest.mark.parametrize("model", TABLE_18)
def test_the_sweep_is_the_search_of_the_paper(model):
    compared = cells(Sweep.load(ROOT / "sweeps" / "paper" / f"glue-{model}.yaml"))
    assert {cell.task.name for cell in compared} == set(TASKS)
    found = {}
    for cell in compared:
        row = TABLE_18[model][cell.task.name]
        search = [run.recipe for point in points(cell.contender.grid) for run in runs_of(cell, "validation", point)]
        assert all(recipe.data.glue == cell.task.name and recipe.data.validate for recipe in search)
        assert {(recipe.train.batch_size, recipe.train.epochs) for recipe in search} == {(row.batch_size, row.epochs)}
        test = runs_of(cell, "test", {})
        assert len(test) == (5 if cell.task.name in FIVE_SEEDS else 3)
        assert not any(run.recipe.data.validate for run in test)
        found[cell.label] = {(recipe.adapter.rank, recipe.train.learning_rate) for recipe in search}
        if cell.label == "boft":
            assert {recipe.adapter.block_size for recipe in search} == {2, 4, 8, 16}
    assert found["eva"] == found["lora"] == found["adalora"] == set(product((2, 4, 6, 8, 16), RATES[model]))
    best = {pair for row in TABLE_18[model].values() for pair in row.best.values()}
    assert best <= found["eva"]


def test_the_command_prints_lines_of_json(capsys):
    table18.main(["--model", "deberta-v3-base", "--method", "eva", "--tasks", "qnli"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [run["train.seed"] for run in lines] == [0, 1, 2]
    assert {(run["adapter.rank"], run["train.batch_size"], run["train.epochs"]) for run in lines} == {(16, 64, 25)}
    with pytest.raises(SystemExit):
        table18.main(["--method", "dora"])
    assert "not of dora: search for them" in capsys.readouterr().err
    with pytest.raises(EvaError, match="Table 18 has the best settings of lora and eva, not of boft: search for them"):
        runs("roberta-large", method="boft")
    with pytest.raises(EvaError, match=r"Table 18 has no model 'roberta' \(did you mean 'roberta-large'\?\); it has"):
        runs("roberta")
    with pytest.raises(EvaError, match=r"Table 18 has no task 'sts-b' \(did you mean 'stsb'"):
        runs("roberta-large", tasks=["sts-b"])
