"""`evatune finetune --dry-run`: what it tells, what it refuses, and that no weight is loaded and no hub is asked."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from evatune import estimate
from evatune.cli.main import main
from evatune.errors import EvaError
from evatune.models import load_config
from evatune.recipe import load_recipe
from evatune.training.accelerators import ACCELERATORS, find_accelerator
from evatune.training.dry_run import dry_run

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))
LARGE = {"deberta-v3-base", "dinov2-giant", "gemma-2-27b", "gemma-2-9b", "llama-2-7b", "llama-3.1-70b", "llama-3.1-8b"}
LARGE |= {"roberta-large"}
"""Shapes with so many layers that following a batch takes seconds."""
ROWS = {
    "commonsense": {"instruction": "Is it? Answer format: a/b", "input": "", "output": "it is a", "answer": "a"},
    "gsm8k": {"question": "1 + 1?", "answer": "#### 2"},
    "mbpp": {"text": "Add.", "code": "def add(a, b): return a + b", "test_list": ["assert add(1, 2) == 3"]},
    "squad": {"question": "Who?", "context": "Ada.", "answers": {"text": ["Ada"], "answer_start": [0]}},
    "treebank": {"tokens": ["Ada", "."], "pos_tags": ["NOUN", "PUNCT"]},
}
COPIES = ["commonsense/boolq", "commonsense/ARC-Easy", "commonsense/ARC-Challenge", "commonsense/openbookqa"]
COPIES += ["gsm8k", "mbpp"]
"""Folders of named tasks, which recipes find in `data.folder`."""

TABLES = {
    "sst2": "good\t1\nbad\t0\n",
    "cola": "gj04\t1\t\tHe runs.\ngj04\t0\t*\tRuns he he.\n",
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tYes.\tYes!\n0\t3\t4\tYes.\tNo.\n",
    "sts": "4\ta dog\tthe dog\n1.5\ta dog\ta cat\n",
}
"""The same for tables of GLUE."""


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder in place of `EVATUNE_DATA`: the files that recipes name, with the right columns and a few rows."""
    folder = tmp_path_factory.mktemp("data")
    for copy in COPIES:
        (folder / copy).mkdir(parents=True)
        for split in ("train", "test"):
            (folder / copy / f"{split}.json").write_text(json.dumps([ROWS[copy.partition("/")[0]]] * 3))
    for recipe in SHIPPED:
        for line in (RECIPES / recipe).read_text().splitlines():
            if line.startswith("#") or "${EVATUNE_DATA}/" not in line:
                continue
            path = folder / line.partition("${EVATUNE_DATA}/")[2].strip()
            path.parent.mkdir(parents=True, exist_ok=True)
            row = ROWS.get(path.relative_to(folder).parts[0])
            if path.suffix == ".json":
                path.write_text(json.dumps([row] * 3))
            elif path.suffix == ".jsonl":
                path.write_text("\n".join([json.dumps(row)] * 3))
            elif path.suffix == ".tsv":
                path.write_text(TABLES[path.relative_to(folder).parts[1]])
            else:
                pictures(path)
    (folder / "demo").mkdir()
    for split in ("train", "heldout"):
        (folder / "demo" / f"{split}.jsonl").write_text(json.dumps({"prompt": "Good?", "completion": " yes"}) + "\n")
    return folder


def pictures(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "png")
    names = ["cat", "dog"] * 5
    rows = {"img": [{"bytes": buffer.getvalue()}] * len(names), "label_name": names}
    parquet.write_table(pyarrow.table(rows), path)


HEAD_IS_SHARED = pytest.mark.filterwarnings("ignore:'lm_head' is trained and shares its weight")
"""The paper adapts the head of Gemma-2-9B too, which is the embedding."""


def shape_of(recipe: str) -> str:
    lines = (RECIPES / recipe).read_text().splitlines()
    return next((Path(line.partition(":")[2]).stem for line in lines if line.startswith("  config:")), "")


@HEAD_IS_SHARED
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if shape_of(name) in LARGE else []) for name in SHIPPED]
)
def test_every_shipped_recipe_passes(name, data, monkeypatch, tmp_path):
    monkeypatch.setenv("EVATUNE_DATA", str(data))
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path))
    overrides = {}
    if (path := "/usr/share/datasets/fashion-mnist") in (RECIPES / name).read_text() and not Path(path).exists():
        overrides = {"data": str(data / "cifar10/train_1000.parquet"), "label_column": "label_name"}
    if "../../demo/data/" in (RECIPES / name).read_text():
        overrides = {"data": str(data / "demo/train.jsonl"), "eval": str(data / "demo/heldout.jsonl")}
    told = dry_run(load_recipe(RECIPES / name, overrides), accelerator=find_accelerator("h100-80gb"))
    assert told.n_trainable and told.n_parameters and told.memory is not None
    assert told.steps or any("data" in note for note in told.unchecked)
    assert "no mistake found" in told.text()
    json.dumps(told.to_json())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("llama2-7b-commonsense", 40.6),
        ("llama3.1-8b-metamath", 44.1),
        ("gemma2-9b-commonsense", 58.2),
        ("gemma2-27b-commonsense", 114.2),
        ("llama3.1-70b-commonsense", 209.3),
    ],
)
@HEAD_IS_SHARED
def test_trainable_parameters_are_those_of_table_13(name, millions):
    assert dry_run(load_recipe(RECIPES / f"paper/{name}.yaml")).n_trainable == pytest.approx(millions * 1e6, abs=5e4)


@pytest.mark.slow
def test_the_largest_recipe_fits_on_the_card_of_each_process():
    recipe = load_recipe(RECIPES / "paper/llama3.1-70b-commonsense.yaml")
    told = dry_run(recipe, accelerator=find_accelerator("a100-80gb"), processes=4)
    assert told.fits and told.sample == "8 x 512 tokens"
    assert told.memory.weights < 45e9  # 141e9 in bfloat16
    assert told.memory.optimizer == 2 * 2 * told.n_trainable  # two moments in bfloat16


def test_processes_share_a_batch(tiny_model):
    recipe = load_recipe(None, {"model": str(tiny_model), "train.batch-size": 8})
    alone, shared = dry_run(recipe), dry_run(recipe, processes=4)
    assert shared.examples_a_step == alone.examples_a_step == 8
    assert shared.memory.step < 0.5 * alone.memory.step
    with pytest.raises(EvaError, match="batch_size is 8, which 3 processes cannot share equally"):
        dry_run(recipe, processes=3)


def test_a_plan_is_looked_at(tiny_model, tmp_path):
    with pytest.raises(EvaError, match="there is no plan"):
        dry_run(load_recipe(None, {"model": str(tiny_model), "plan": str(tmp_path / "none.json")}))


def test_it_tells_what_a_run_then_does(tiny_model, tiny_data, capsys):
    arguments = ["finetune", "--model", str(tiny_model), "--data", str(tiny_data / "train.jsonl"), "--rank", "2"]
    arguments += ["--method", "lora", "--train.batch-size", "7", "--epochs", "2", "--precision", "bf16"]
    assert main([*arguments, "--dry-run", "--on", "a100-40gb", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["columns"] == "instruction, output, answer"
    assert (told["n_examples"], told["steps"]) == (60, 18)
    assert told["model"] == "LlamaForCausalLM" and told["n_targets"] == 14
    assert told["fits"] and told["least_seconds"] > 0 and told["unchecked"] == []
    assert told["memory"]["total"] == sum(told["memory"][name] for name in ("weights", "optimizer", "step"))
    assert told["memory"]["optimizer"] == 8 * told["n_trainable"]


def test_what_is_kept_for_validation_is_not_counted(tiny_model, tiny_data):
    values = {"model": str(tiny_model), "data": str(tiny_data / "train.jsonl"), "validate": True, "held_out": 0.1}
    assert dry_run(load_recipe(None, values)).n_examples == 54


def test_a_data_set_on_a_hub_is_not_read_though_named_tasks_are_on_disk(tmp_path):
    values = {"model": "some/model", "data": "some/data", "format": "gsm8k", "folder": str(tmp_path)}
    assert "the rows of some/data are on a hub" in dry_run(load_recipe(None, values)).unchecked[1]


def test_the_tokenizer_of_a_hub_model_is_not_asked_for(tiny_model, tmp_path, monkeypatch):
    config = load_config(tiny_model)
    monkeypatch.setattr("evatune.tasks.outline.local_config", lambda *args, **options: config)  # in the hub's cache
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **options: pytest.fail("asked"))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"messages": turns}))
    told = dry_run(load_recipe(None, {"model": "some/model", "data": str(tmp_path / "turns.jsonl")}))
    assert (told.n_examples, told.columns) == (1, "messages")


def test_without_a_configuration_it_says_what_is_unknown():
    recipe = load_recipe(None, {"model": "some/model", "data": "some/data", "format": "gsm8k"})
    told = dry_run(recipe)
    assert told.model is None and told.memory is None and told.steps is None
    assert "the model some/model is not on this machine and model.config names no file" in told.unchecked[0]
    assert "the rows of some/data are on a hub" in told.unchecked[1]
    assert "unknown number of steps" in told.text()


def test_the_stated_number_of_examples_gives_the_steps():
    recipe = load_recipe(None, {"model": "some/model", "data": "some/data", "train_size": 1000})
    assert dry_run(recipe).steps == 125
    named = dry_run(load_recipe(None, {"model": "some/model", "data": "commonsense/boolq"}))
    assert (named.columns, named.n_examples) == ("those of google/boolq", 9427)
    recipe = load_recipe(None, {"model": "a/b", "data": "c/d", "train_size": 9, "max_train_examples": 8})
    assert dry_run(recipe).steps == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data": "no_such.jsonl"}, "there is no data file no_such.jsonl"),
        ({"eval": "no_such.jsonl"}, "there is no data file no_such.jsonl"),
        ({"eval": "metamath"}, "task 'metamath' is for training only"),
        ({"eval": "math/algebr"}, r"no task 'math/algebr' \(did you mean 'math/algebra'"),
        ({"format": "gsm8k"}, "lacks question of format 'gsm8k'; it has instruction, input, output, answer"),
        ({"target_modules": "q_prj"}, "q_prj"),
        ({"method": "pissa", "rank": 40, "rho": 1}, "rank 40 is too large for method 'pissa'"),
        ({"model.config": "no_such.json", "model": "some/model"}, "there is no configuration file no_such.json"),
        ({"model": "./no/such/folder"}, "there is no model folder"),
        ({"model": ""}, "no model was given"),
    ],
)
def test_mistakes_that_would_end_a_run_end_it(overrides, message, tiny_model, tiny_data):
    settings = {"model": str(tiny_model), "data": str(tiny_data / "train.jsonl")} | overrides
    with pytest.raises(EvaError, match=message):
        dry_run(load_recipe(None, settings))


def test_what_is_scored_is_looked_at(tiny_model, tiny_data, tmp_path):
    def notes(**settings):
        values = {"model": str(tiny_model), "data": str(tiny_data / "train.jsonl"), "scoring": "generated"} | settings
        return dry_run(load_recipe(None, values)).unchecked

    (away,) = notes(eval=["gsm8", "math"])
    assert away == "the rows of gsm8 (did you mean 'gsm8k'?), math are on a hub, so their columns were not looked at"
    needed = "a run needs --allow-code-execution, since its score needs programs of the model to be run"
    assert notes(eval="mbpp")[1:] == (needed,)
    (tmp_path / "mbpp").mkdir()
    (tmp_path / "mbpp" / "test.jsonl").write_text(json.dumps(ROWS["mbpp"]))
    assert notes(eval="mbpp", folder=str(tmp_path)) == (needed,)
    assert notes(eval="mbpp", folder=str(tmp_path), allow_code_execution=True) == ()
    assert notes(eval="mbpp", folder=str(tmp_path), scoring="likelihood") == ()
    values = {"task": "understanding", "model": str(tiny_model), "data": str(tmp_path / "a.jsonl")}
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    told = dry_run(load_recipe(None, values | {"eval": "some/texts"}))
    assert told.n_examples == 2 and told.unchecked == (
        "the rows of some/texts are on a hub, so their columns were not looked at",
    )
    with pytest.raises(EvaError, match=r"there is no data file no_such\.jsonl"):
        dry_run(load_recipe(None, values | {"eval": "no_such.jsonl"}))


def test_an_unknown_card_is_named_with_its_near_misses(tiny_model, capsys):
    assert main(["finetune", "--model", str(tiny_model), "--dry-run", "--on", "h100-80"]) == 1
    assert "there is no accelerator 'h100-80' (did you mean 'h100-80gb'" in capsys.readouterr().err
    assert all(card.source and card.name.endswith(f"-{card.gigabytes}gb") for card in ACCELERATORS.values())


def test_what_measuring_keeps_is_told(tiny_model, tiny_data):
    def told(**overrides):
        return dry_run(
            load_recipe(None, {"model": str(tiny_model), "data": str(tiny_data / "train.jsonl")} | overrides)
        )

    bound = estimate(str(tiny_model), rank=16, batch_size=4, length=512)
    assert told().measuring == bound.state_bytes + bound.cached_bytes
    assert "while measuring" in told().text()
    assert told(method="lora").measuring is None


def test_a_card_is_for_a_dry_run_alone(tiny_model, capsys):
    assert main(["finetune", "--model", str(tiny_model), "--on", "h100-80gb"]) == 1
    assert "--on and --processes are for --dry-run" in capsys.readouterr().err


def test_what_does_not_fit_is_said(tiny_model, tiny_data):
    recipe = load_recipe(None, {"model": str(tiny_model), "data": str(tiny_data / "train.jsonl")})
    card = replace(find_accelerator("l4-24gb"), gigabytes=0)
    told = dry_run(recipe, accelerator=card)
    assert told.fits is False
    assert "does not fit on l4-24gb" in told.text()


@pytest.mark.filterwarnings("default::evatune.EvaWarning")
def test_a_shared_weight_is_told_in_a_line_and_not_changed(tiny_model, tiny_data, capsys):
    command = ["finetune", "--dry-run", "--model", str(tiny_model), "--data", str(tiny_data / "train.jsonl")]
    assert main(command) == 0
    assert "warning" not in capsys.readouterr().err.lower()
    command += ["--target-modules", "lm_head", "--rank", "4"]
    assert main(command) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line.lower()]
    assert len(told) == 1 and told[0].startswith("warning   'lm_head' is trained and shares its weight with 'model.em")
    assert main([*command, "--method", "pissa"]) == 1
    assert "'lm_head' shares its weight with 'model.embed_tokens', so it cannot be changed" in capsys.readouterr().err


@pytest.mark.parametrize("glue", ["cola", "stsb"])
@pytest.mark.parametrize("kind", ["auto", "token-classification", "question-answering"])
def test_every_kind_of_understanding(kind, glue):
    settings = {"task": "understanding", "model": "some/model", "data.train_size": 100, "data": "some/data"}
    settings |= {"data.kind": kind} if kind != "auto" else {"data.glue": glue}
    settings |= {"model.config": str(RECIPES / "shapes/minilm-l6.json"), "max_length": 16}
    told = dry_run(load_recipe(None, settings))
    assert told.memory is not None and told.flops_a_step, told.unchecked
    assert told.steps == 13 and told.model.startswith("BertFor")


def test_control_asks_no_hub(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr("evatune.tasks.control.task.load_config", refuse)
    (tmp_path / "episodes").mkdir()
    settings = {"task": "control", "data": f"reach-v3,{tmp_path / 'episodes'}"}
    told = dry_run(load_recipe(None, settings | {"model": "some/model"}))
    assert told.model is None and "the model some/model is not on this machine" in told.unchecked[0]
    assert "episodes of reach-v3, which are collected first" in told.columns
    new = dry_run(load_recipe(None, settings | {"model": "new:1x2x8", "model.config": "no_such.json"}))
    assert new.model == "DecisionTransformer"
    shape = {"model": "some/model", "model.config": str(RECIPES / "shapes/minilm-l6.json")}
    with pytest.raises(EvaError, match="'some/model' is a model of type 'bert', but task 'control' needs a Decision"):
        dry_run(load_recipe(None, settings | shape))


@pytest.mark.parametrize(
    ("data", "n_examples"),
    [
        ({"data": "vtab:dtd"}, 1000),
        ({"data": "vtab:dtd", "validate": True}, 800),
        ({"data": "vtab:dtd", "validate": True, "held_out": 0.1}, 900),
        ({"data": "vtab:dtd", "max_train_examples": 100}, 100),
        ({"data": "some/pictures", "eval": "some/others", "train_size": 50}, 50),
        ({"data": "some/pictures", "eval": "some/others", "train_size": 50, "validate": True}, 40),
        ({"data": "some/pictures", "train_size": 50, "max_train_examples": 20}, 16),
        ({"data": "some/pictures", "train_size": 50, "held_out": 0.1, "validate": True}, 41),
        ({"data": "some/pictures"}, None),
    ],
)
def test_pictures_on_a_hub_are_counted_by_what_is_stated(data, n_examples):
    told = dry_run(load_recipe(None, {"task": "vision", "model": "some/model"} | data))
    assert told.n_examples == n_examples
    assert any("on a hub" in note for note in told.unchecked)
    assert ("the classes are unknown, and 10 are assumed" in told.unchecked) == (data["data"] == "some/pictures")


@pytest.mark.parametrize(("validate", "n_examples"), [(False, 2490), (True, 1992)])
def test_a_share_of_glue_is_held_out_for_a_search(validate, n_examples):
    settings = {"task": "understanding", "model": "some/model", "data.glue": "rte", "validate": validate}
    assert dry_run(load_recipe(None, settings)).n_examples == n_examples
