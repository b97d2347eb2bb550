from __future__ import annotations

import re
from pathlib import Path

import pytest

from evatune.compare.runs import cells, points, runs_of
from evatune.compare.sweep import Sweep
from evatune.errors import EvaError


def test_a_sweep_is_tasks_times_models_times_methods_times_ranks_times_rhos(sweep):
    content = sweep(models=["a/one", "b/two"], methods=["lora", "eva", "full"], ranks=[4, 8], rhos=[1, 2])
    labels = [cell.label for cell in cells(content) if cell.model == "a/one"]
    assert labels == [
        *("lora r=4", "lora r=8"),
        *("eva ρ=1 r=4", "eva ρ=2 r=4", "eva ρ=1 r=8", "eva ρ=2 r=8"),
        "full",
    ]
    assert len(cells(content)) == 2 * len(labels)


def test_runs_have_names_recipes_and_seeds_of_their_own(sweep):
    content = sweep(settings={"steps": 7})
    eva = cells(content)[1]
    validation = runs_of(eva, "validation", {"train.learning_rate": 1e-3})
    test = runs_of(eva, "test", {"train.learning_rate": 1e-3})
    assert [run.name for run in validation] == ["task/eva/lr0.001-seed1000"]
    assert [run.name for run in test] == ["task/eva/lr0.001-seed0", "task/eva/lr0.001-seed1"]
    recipe = test[1].recipe
    assert (recipe.adapter.method, recipe.train.steps, recipe.train.learning_rate, recipe.train.seed) == (
        "eva",
        7,
        1e-3,
        1,
    )
    assert recipe.data.eval == ("test.jsonl",) and validation[0].recipe.data.eval == ("validation.jsonl",)


def test_files_are_found_beside_the_sweep(sweep, tmp_path, monkeypatch):
    (tmp_path / "validation.jsonl").write_text("")
    monkeypatch.chdir("/")
    cell = cells(
        sweep(
            recipes={"a": {"recipe": "task.yaml", "test": {"data.eval": ["validation.jsonl", "hub/id"]}}},
            validation={"eval": "other.jsonl"},
        )
    )[0]
    recipe = runs_of(cell, "test", {})[0].recipe
    assert recipe.data.eval == (str(tmp_path / "validation.jsonl"), "hub/id")
    assert runs_of(cell, "validation", {})[0].recipe.data.eval == ("other.jsonl",)


def test_methods_have_settings_and_grids_of_their_own(sweep):
    methods = {"full": {"learning_rate": ["1e-5", 1e-4]}, "twice": {"method": "lora", "lora_alpha": 8}, "eva": None}
    content = sweep(methods=methods, search={"weight_decay": [0, 0.1]})
    full, twice, eva = content.contenders
    assert full.grid == {"train.learning_rate": (1e-5, 1e-4), "train.weight_decay": (0.0, 0.1)}
    assert twice.choice.name == "lora" and twice.values["adapter.lora_alpha"] == 8
    assert eva.grid["train.learning_rate"] == (1e-3, 1e-2, 1e-1)
    assert len(points(eva.grid)) == 6
    assert points({}) == [{}]


def test_runs_that_differ_in_what_a_spectrum_does_not_depend_on_share_it(sweep):
    methods = {"eva": None, "eva+dora": None, "eva-rot": None, "alpha": {"method": "eva", "lora_alpha": 8}}
    keys = {}
    for cell in cells(sweep(methods=methods | {"rho": {"method": "eva", "rho": 1}, "lora": None, "eva-minor": None})):
        runs = [runs_of(cell, "test", {"train.learning_rate": rate}) for rate in (1e-3, 1e-2)]
        assert {run.spectra_key for run in runs[0]} == {run.spectra_key for run in runs[1]}
        keys[cell.label] = [run.spectra_key for run in runs[0]]
    assert keys["eva"] == keys["eva+dora"] == keys["eva-rot"] == keys["alpha"]
    assert len(set(keys["eva"])) == 2  # other seeds see the data in another order
    assert not set(keys["eva"]) & set(keys["rho"])
    assert keys["lora"] == keys["eva-minor"] == [None, None]


WRONG = {
    "a key": (
        {"learning_rate": [1]},
        "sweep.yaml: a sweep has no key 'learning_rate' .*'learning_rates'",
    ),
    "a method": ({"methods": ["eav"]}, "there is no method 'eav'.*did you mean 'eva'"),
    "a setting of a method": ({"methods": {"eva": {"rnak": 2}}}, "there is no setting 'rnak'.*did you mean 'rank'"),
    "a grid": ({"methods": {"eva": {"learning_rate": ["fast"]}}}, "learning_rate is 'fast', but must be a number"),
    "a grid with a value twice": ({"learning_rates": [1, 1]}, "grid of train.learning_rate for method 'lora' .* twice"),
    "a search of one value": ({"search": {"weight_decay": 0.1}}, "search of 'weight_decay' is 0.1, but must be a list"),
    "no methods": ({"methods": None}, "compares nothing without methods"),
    "no recipes": ({"recipes": None}, "compares nothing without recipes"),
    "methods twice": ({"methods": ["eva", "eva"]}, "methods has eva twice"),
    "a group": (
        {"recipes": {"a": {"recipe": "task.yaml", "group": ["x"]}}},
        "group of recipe 'a' is \\['x'\\], but must",
    ),
    "a recipe's key": ({"recipes": {"a": {"recipe": "task.yaml", "tset": {}}}}, "recipe 'a' has no key 'tset'.*'test'"),
    "a recipe without file": ({"recipes": {"a": {"test": {}}}}, "recipe 'a' names no file"),
    "seeds of both stages": ({"test": {"seeds": [1000]}}, "1000 is a seed of validation and of test runs"),
    "no seeds": ({"test": {"seeds": 0}}, "seeds are 0, but must be a count of at least 1"),
    "settings": ({"settings": [1]}, "settings is .1., but must be a mapping"),
    "keep": ({"keep": "all"}, "keep is 'all', but must be one of records, adapters"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_in_a_sweep_is_named(sweep, wrong):
    changed, message = WRONG[wrong]
    with pytest.raises(EvaError, match=message):
        sweep(**changed)


def test_choosing_on_the_examples_that_are_reported_is_refused(sweep):
    with pytest.raises(EvaError, match="scores the same held-out examples to choose and to report"):
        cells(sweep(validation={}))


def test_the_untuned_model_is_scored_in_test_runs(sweep):
    found = cells(sweep(validation={"validate": True, "eval_before": False}))
    assert not runs_of(found[0], "validation", points(found[0].contender.grid)[0])[0].recipe.train.eval_before
    with pytest.raises(EvaError, match="the test runs of recipe 'task' have eval_before: false"):
        cells(sweep(settings={"eval_before": False}))


def test_two_runs_with_one_name_are_refused(sweep):
    with pytest.raises(EvaError, match="two runs of the sweep have one name, task/a-b"):
        cells(sweep(methods={"a b": {"method": "lora"}, "a-b": {"method": "eva"}}))


def test_a_recipe_that_is_not_there_is_named(sweep):
    with pytest.raises(EvaError, match=r"there is no recipe file .*tsak\.yaml \(did you mean 'task\.yaml'"):
        cells(sweep(recipes=["tsak.yaml"]))


ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "sweeps").glob("*.yaml"))
FOLLOW_UPS = {"control-longer", "vision-digits-finer"}
"""Of a question that a sweep leaves, with fewer methods."""
PAPER = sorted((ROOT / "sweeps" / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps(path, monkeypatch, tmp_path):
    monkeypatch.setenv("EVATUNE_DATA", str(tmp_path))
    compared = cells(Sweep.load(path))
    n_methods, n_rates = (4, 4) if path.stem in FOLLOW_UPS else (8, 5)
    assert len(compared) >= n_methods and "lora" in [cell.label for cell in compared]
    assert all(len(cell.contender.grid["train.learning_rate"]) >= n_rates for cell in compared)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_sweeps_of_the_paper(path):
    """Every run has a recipe of the paper, and the page of reproduction says what the sweep is for."""
    compared = cells(Sweep.load(path))
    for cell in compared:
        recipe = runs_of(cell, "test", {})[0].recipe
        assert cell.task.recipe.parent == ROOT / "recipes" / "paper"
        assert recipe.adapter.choice.name == cell.contender.choice.name
        assert cell.searches or set(cell.contender.grid) == {"train.learning_rate"}
    assert f"`{path.name}`" in (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert f"sweeps/paper/{path.name} --dry-run" in path.read_text(encoding="utf-8")


def test_every_table_and_figure_of_the_paper_is_on_the_page_of_reproduction():
    text = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    rows = re.sub(r" \(deviations\)| left| right", "", "\n".join(line for line in text.splitlines() if line[:1] == "|"))
    for kind, last in (("Table", 26), ("Figure", 14)):
        found: set[int] = set()
        for numbers in re.findall(rf"{kind}s? (\d+(?:(?:, | to | and )\d+)*)", rows):
            for part in re.split(", | and ", numbers):
                first, _, end = part.partition(" to ")
                found |= set(range(int(first), int(end or first) + 1))
        assert found == set(range(1, last + 1))


def test_a_metric_that_the_runs_cannot_have_is_told_before_any_of_them(sweep, recipe_file):
    with pytest.raises(
        EvaError, match=r"metric is 'acuracy' \(did you mean 'accuracy'\?\), but .*'task' .*loss, exact"
    ):
        cells(sweep(metric="acuracy"))
    with pytest.raises(EvaError, match="metric is 'generated', but"):  # nothing is written
        cells(sweep(metric="generated"))
    assert cells(sweep(metric="accuracy/boolq"))
    recipe_file.write_text(recipe_file.read_text() + "task: understanding\n")
    sentences = sweep(metric="f1", settings={"classes": ["a", "b", "c"]})
    with pytest.raises(EvaError, match=r"metric is 'f1', but .* \(task 'understanding'\) can have .*, macro_f1\."):
        cells(sentences)
    assert cells(sweep(metric="f1"))


def test_a_searched_value_that_is_not_allowed_is_told_before_any_run(sweep):
    with pytest.raises(EvaError, match=r"lora_dropout is 2\.0, but must be .*less than 1"):
        cells(sweep(search={"lora_dropout": [0.1, 2.0]}))


def test_a_recipe_without_model_or_data_is_named(sweep, recipe_file):
    recipe_file.write_text("data: train.jsonl\n")
    with pytest.raises(EvaError, match=r"task\.yaml names no model; set `model` in it, or `models` in the sweep"):
        cells(sweep())
    recipe_file.write_text("model: none/such\n")
    with pytest.raises(EvaError, match=r"task\.yaml names no training data; set `data` in it, or `train` under"):
        cells(sweep())
