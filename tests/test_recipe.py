"""The recipe: defaults, files, overrides, and errors that name the key, the value and what is allowed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from evatune.errors import EvaError
from evatune.recipe import MEANT, AdapterSettings, Recipe, all_settings, find_setting, load_recipe
from evatune.settings import describe_kind

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


def test_everything_has_a_default_and_a_help():
    assert load_recipe() == Recipe()
    for setting in all_settings():
        assert setting.help.endswith(".")
        assert setting.default is not dataclasses.MISSING
        assert describe_kind(setting.kind)
    assert len({setting.option for setting in all_settings()}) == len(all_settings())


@pytest.mark.parametrize(
    ("section", "name", "meant"),
    [
        ("train", "lr", "train.learning_rate"),
        ("train", "rank", "adapter.rank"),
        ("adapter", "r", "adapter.rank"),
        ("model", "max_length", "data.max_length"),
    ],
)
def test_settings_of_other_programs_and_of_other_sections_are_understood(section, name, meant):
    with pytest.raises(EvaError, match=rf"section '{section}' has no setting '{name}' \(did you mean '{meant}'\?\)"):
        Recipe.from_dict({section: {name: 1}})


def test_what_other_programs_call_a_setting_means_one_of_ours():
    assert all(find_setting(path).path == path for path in MEANT.values())


def test_the_help_says_what_a_setting_means_in_each_task():
    helps = {setting.path: setting.help for setting in all_settings()}
    found = [helps["data.train"].find(start) for start in ("generation: Tr", "understanding: Tr", "vision: A folder")]
    assert -1 < found[0] < found[1] < found[2] < helps["data.train"].find("control: Environments")
    assert helps["data.max_train_examples"].startswith("generation and understanding: Keep")
    assert helps["adapter.rho"].startswith("No target") and helps["data.image_size"].startswith("Side")


def test_yaml_round_trip(tmp_path):
    recipe = load_recipe(None, {"rank": 8, "target-modules": "q_proj,v_proj", "tau": "none", "data": ["a.jsonl", "b"]})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.adapter.target_modules == ("q_proj", "v_proj")
    assert recipe.measure.tau is None


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("rank", "8", "adapter.rank", 8),
        ("--learning-rate", "5e-4", "train.learning_rate", 5e-4),
        ("train.batch-size", "3", "train.batch_size", 3),
        ("measure.batch_size", 2, "measure.batch_size", 2),
        ("model", "gpt2", "model.name", "gpt2"),
        ("train-a", "false", "adapter.train_a", False),
        ("max-eval-examples", "none", "data.max_eval_examples", None),
        ("target_modules", "q_proj", "adapter.target_modules", ("q_proj",)),
        ("target_modules", "all-linear", "adapter.target_modules", "all-linear"),
        ("target_modules", r".*\.(q|v)_proj", "adapter.target_modules", r".*\.(q|v)_proj"),
        ("output", "runs/a", "output", "runs/a"),
    ],
)
def test_overrides(name, value, path, expected):
    found = load_recipe(None, {name: value})
    for part in path.split("."):
        found = getattr(found, part)
    assert found == expected


def test_epochs_that_are_given_win_over_steps_of_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text("train:\n  steps: 100\n")
    assert load_recipe(tmp_path / "r.yaml", {"epochs": "2"}).train.steps is None
    assert load_recipe(tmp_path / "r.yaml", {"epochs": "2", "steps": 7}).train.steps == 7
    assert load_recipe(tmp_path / "r.yaml", {"rank": 2}).train.steps == 100


def test_a_section_may_be_its_first_setting(tmp_path):
    (tmp_path / "r.yaml").write_text("model: gpt2\ndata: squad\ntrain:\n  learning_rate: 1e-3\n")
    recipe = load_recipe(tmp_path / "r.yaml", {"dtype": "bfloat16", "eval": "x.json"})
    assert (recipe.model.name, recipe.model.dtype) == ("gpt2", "bfloat16")
    assert (recipe.data.train, recipe.data.eval) == (("squad",), ("x.json",))
    assert recipe.train.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rnak": 1}, r"no setting 'rnak' \(did you mean 'rank'"),
        ({"batch_size": 1}, "could mean 'measure.batch_size' or 'train.batch_size'"),
        ({"rank": 0}, r"adapter\.rank is 0, but must be at least 1"),
        ({"rank": 1.5}, r"adapter\.rank is 1\.5, but must be a whole number"),
        ({"rank": "many"}, r"adapter\.rank is 'many', but must be a whole number"),
        ({"rank": True}, r"adapter\.rank is True, but must be a whole number"),
        ({"rank": "none"}, r"adapter\.rank is 'none', but must be a whole number"),
        ({"rho": 0.99}, r"adapter\.rho is 0\.99, but must be at least 1"),
        ({"learning_rate": 0}, r"train\.learning_rate is 0\.0, but must be greater than 0"),
        ({"learning_rate": "nan"}, r"train\.learning_rate is 'nan', but must be a number"),
        ({"lora_dropout": 1}, "must be at least 0 and less than 1"),
        ({"tau": 0}, r"measure\.tau is 0\.0, but must be greater than 0 and at most 1"),
        ({"learning_rate": "inf"}, r"train\.learning_rate is 'inf', but must be a number"),
        ({"layers_to_transform": "1,x"}, "layers_to_transform is '1,x', but must be a whole number or a list of whole"),
        ({"schedule": "linaer"}, r"must be one of linear, cosine, constant \(did you mean 'linear'"),
        ({"train_a": "maybe"}, "must be true or false"),
        ({"target_modules": [""]}, "must be a string or a list of strings"),
        ({"data": [1]}, r"data\.train is \[1\], but must be a list of strings"),
        ({"n_components": 31}, "n_components is 31, but rank 16 with rho 2 needs at least 32"),
    ],
)
def test_wrong_settings(overrides, message):
    with pytest.raises(EvaError, match=message):
        load_recipe(None, overrides)


def test_settings_check_themselves_in_python():
    with pytest.raises(EvaError, match=r"adapter\.rank is 0"):
        AdapterSettings(rank=0)
    with pytest.raises(dataclasses.FrozenInstanceError, match="rank"):
        AdapterSettings().rank = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", r"no section 'modle' \(did you mean 'model'"),
        ("train:\n  lerning_rate: 1", r"section 'train' has no setting 'lerning_rate' \(did you mean 'learning_rate'"),
        ("train: [", "not valid YAML"),
        ("- a", "must hold sections"),
        ("adapter:\n  rank: -1", r"r\.yaml: adapter\.rank is -1"),
        ("data: ${EVATUNE_NO_SUCH}/x", "environment variable EVATUNE_NO_SUCH"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(EvaError, match=message):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("model: a\ntrain:\n  steps: 1\nmodel: b\n", "model", "1 and 4"),
        ("train:\n  steps: 1\n  batch_size: 2\n  steps: 3\n", "steps", "2 and 4"),
        ("data:\n  columns: {text: 1, text: 2}\n", "text", "2 and 2"),
    ],
)
def test_a_second_key_of_one_name_is_refused_with_both_lines(tmp_path, text, key, lines):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(EvaError, match=rf"r\.yaml has the key '{key}' twice, in lines {lines}\."):
        load_recipe(tmp_path / "r.yaml")


def test_a_setting_of_another_task_says_whose_it_is():
    with pytest.raises(
        EvaError, match="section 'data' of task 'generation' has no setting 'image_size'; it belongs to"
    ):
        Recipe.from_dict({"data": {"image_size": 32}})
    with pytest.raises(
        EvaError, match="of task 'understanding' has no setting 'format'; it belongs to task generation"
    ):
        Recipe.from_dict({"task": "understanding", "data": {"format": "text"}})


def test_columns_are_a_mapping_in_files_and_words_on_the_command_line(tmp_path):
    (tmp_path / "r.yaml").write_text("task: understanding\ndata:\n  columns: {text: 1, label: gold}\n")
    assert load_recipe(tmp_path / "r.yaml").data.columns == {"text": "1", "label": "gold"}
    words = load_recipe(None, {"task": "understanding", "columns": ["text=1", "label=gold"]})
    assert words.data.columns == {"text": "1", "label": "gold"}
    with pytest.raises(EvaError, match=r"data\.columns is \['text'\], but must be a mapping"):
        load_recipe(None, {"columns": ["text"]})
    assert load_recipe(None, {"columns": "text=1"}).data.columns == {"text": "1"}  # as one alone comes from there
    with pytest.raises(EvaError, match=r"data.columns is .text:1., .*: on the command line NAME=VALUE"):
        load_recipe(None, {"columns": "text:1"})


def test_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "small.yaml").write_text("")
    with pytest.raises(EvaError, match=r"no recipe file .*smal\.yaml \(did you mean 'small\.yaml'"):
        load_recipe(tmp_path / "smal.yaml")


def test_paths_are_relative_to_the_recipe(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text("{}")
    (folder / "r.yaml").write_text("model: org/model\ndata:\n  train: data/train.jsonl\noutput: runs/one\n")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("project/r.yaml")
    assert recipe.data.train == ("project/data/train.jsonl",)
    assert recipe.output == "project/runs/one"
    assert recipe.model.name == "org/model"
    assert load_recipe("project/r.yaml", {"output": "here"}).output == "here"
    absolute = recipe.with_absolute_paths()
    assert absolute.data.train == (str(folder / "data" / "train.jsonl"),)
    assert absolute.model.name == "org/model"


def test_an_unset_variable_may_be_overridden(tmp_path):
    (tmp_path / "r.yaml").write_text("data: ${EVATUNE_NO_SUCH}/x\n")
    assert load_recipe(tmp_path / "r.yaml", {"data": "y.json"}).data.train == ("y.json",)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes(path, monkeypatch):
    monkeypatch.setenv("EVATUNE_DATA", "data")
    recipe = load_recipe(path)
    assert recipe.model.name
    assert recipe.adapter.method in ("eva", "eva+qlora", "full")
    if path.stem.startswith("metaworld") and path.parent.name == "paper":  # Appendix E.2
        train = recipe.train
        assert (train.batch_size, train.learning_rate, train.final_learning_rate) == (128, 1e-4, 1e-6)
        assert (train.steps * train.warmup_ratio, train.max_grad_norm, train.weight_decay) == (4000, 0.25, 0.01)
        assert (train.schedule, train.precision) == ("cosine", "bf16")
    if path.stem.startswith("llama2"):  # Table 6
        train, adapter = recipe.train, recipe.adapter
        assert (train.batch_size * train.gradient_accumulation, train.epochs, train.learning_rate) == (32, 1.0, 5e-4)
        assert (train.schedule, train.warmup_ratio, train.weight_decay) == ("linear", 0.03, 0.0)
        assert (adapter.rank, adapter.lora_alpha, adapter.lora_dropout) == (16, 1.0, 0.0)
        assert (recipe.measure.batch_size, recipe.measure.tau) == (16, 0.99)


@pytest.mark.parametrize(
    ("method", "message"),
    [("vera", "adapter.method: method 'vera' has no A to freeze"), ("eva+lora+", "adapter.method: lora. sets the")],
)
def test_a_frozen_a_that_makes_no_sense_is_refused_with_the_recipe(method, message):
    with pytest.raises(EvaError, match=message):
        Recipe.from_dict({"adapter": {"method": method, "train_a": False}})
    assert Recipe.from_dict({"adapter": {"method": method}}).adapter.train_a
    assert not Recipe.from_dict({"adapter": {"method": "eva", "train_a": False}}).adapter.train_a


def test_a_mistake_is_told_where_it_is(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("adapter: {rank: 4}\n")
    with pytest.raises(EvaError, match=r"^train\.learning_rate is -1\.0, but must be greater than 0"):
        load_recipe(path, {"learning_rate": -1.0})  # the file is right
    path.write_text("adapter: {rank: 0}\n")
    with pytest.raises(EvaError, match=r"r\.yaml: adapter\.rank is 0"):
        load_recipe(path, {"learning_rate": 1.0})
    path.write_text("adapter: [1\ntrain: 2\n")
    with pytest.raises(EvaError, match=r"r\.yaml is not valid YAML: .* in line 2, column 6\.$"):
        load_recipe(path)
