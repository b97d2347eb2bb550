"""EVA in PEFT's comparison: a stand-in for its script, which trains a tiny model and writes the record's fields."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "peft-comparison" / "run.py"

STAND_IN = """
import json, types
import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

def get_train_config(path):
    content = json.load(open("default_training_params.json")) | json.load(open(path))
    return types.SimpleNamespace(**content)

def get_tokenizer(*, model_id, max_seq_length):
    return AutoTokenizer.from_pretrained(model_id)

class Rows:
    def __init__(self, tokenizer, template):
        texts = [template.format(query=f"is {n} red" + " blue" * n) + " true" for n in range(16)]
        self.rows = tokenizer(texts)
    def __len__(self):
        return 16
    def __getitem__(self, part):
        return {name: self.rows[name][part] for name in ("input_ids", "attention_mask")}

def get_train_valid_test_datasets(*, tokenizer, query_template, print_fn):
    rows = Rows(tokenizer, query_template)
    return rows, rows, rows

def get_model(*, model_id, peft_config):
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model_id), peft_config)

def main(*, path_experiment, experiment_name, clean):
    settings = get_train_config(path_experiment + "/training_params.json")
    config = PeftConfig.from_pretrained(path_experiment)
    model = get_model(model_id=settings.model_id, peft_config=config)
    down = {name: p for name, p in model.named_parameters() if "lora_A" in name}
    gram = max(float((p @ p.T - torch.eye(len(p))).abs().max()) for p in down.values())
    record = {
        "run_info": {"experiment_name": experiment_name, "train_config": vars(settings)},
        "train_info": {"num_trainable_params": model.get_nb_trainable_parameters()[0], "status": "success"},
        "meta_info": {"off_orthonormal": gram, "ranks": sorted(len(p) for p in down.values())},
    }
    json.dump(record, open("results.json", "w"))
"""


@pytest.fixture
def comparison(tmp_path, tiny_model, monkeypatch):
    """A folder like the comparison's; the program's path and folder are as before afterwards."""
    folder = tmp_path / "MetaMathQA"
    folder.mkdir()
    (folder / "run.py").write_text(STAND_IN)
    defaults = {
        "model_id": str(tiny_model),
        "max_seq_length": 64,
        "batch_size": 4,
        "query_template": "Question: {query} Think step by step.\nAnswer:",
        "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    }
    (folder / "default_training_params.json").write_text(json.dumps(defaults))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    before = os.getcwd()
    yield folder
    os.chdir(before)
    sys.modules.pop("run", None)


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("peft_comparison", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_adapter_starts_from_eva_and_the_record_is_the_comparisons(program, comparison):
    program.main([str(comparison), "--rho", "1.5", "--batches", "3", "--learning-rate", "3e-4"])
    record = json.loads((comparison / "results.json").read_text())
    assert record["run_info"]["experiment_name"] == "lora/llama-3.2-3B-rank32-eva-rho1.5-lr_0.0003"
    assert record["run_info"]["train_config"]["optimizer_kwargs"] == {"lr": 3e-4, "weight_decay": 0.1}
    assert record["meta_info"]["off_orthonormal"] < 1e-4  # a random A is far from it
    assert record["train_info"]["num_trainable_params"] > 0


def test_a_dry_run_writes_the_experiment_only(program, comparison):
    program.main([str(comparison), "--dry-run"])
    folder = comparison / "experiments" / "lora" / "llama-3.2-3B-rank32-eva-rho2"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (32, 64)
    assert json.loads((folder / "training_params.json").read_text()) == {}
    assert not (comparison / "results.json").exists()


def test_what_is_no_comparison_is_told(program, comparison, tmp_path):
    with pytest.raises(SystemExit, match=r"is not PEFT's comparison: it has no run\.py"):
        program.main([str(tmp_path)])
    (comparison / "run.py").write_text(STAND_IN.replace("def get_tokenizer", "def tokenizer_of"))
    with pytest.raises(SystemExit, match=r"run\.py has no get_tokenizer; this program knows an older one"):
        program.main([str(comparison)])
