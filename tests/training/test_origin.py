"""Runs, spectra and adapters know the model and the data that they were made with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from evatune.cli.main import main
from evatune.errors import EvaError
from evatune.models import load_model, load_tokenizer, save_model
from evatune.recipe import Recipe
from evatune.training import finetune


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    model = load_model(tiny_model)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("other") / "model"
    return save_model(model, folder, tokenizer=load_tokenizer(tiny_model))


@pytest.fixture
def recipe(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Recipe:
    shutil.copy(tiny_data / "train.jsonl", tmp_path / "train.jsonl")
    return Recipe.from_dict(
        {
            "model": str(tiny_model),
            "data": {"train": [str(tmp_path / "train.jsonl")], "eval": [str(tiny_data / "test.jsonl")]},
            "adapter": {"rank": 2},
            "measure": {"max_batches": 2},
            "train": {"steps": 2, "batch_size": 4, "precision": "fp32", "save_steps": 1},
            "output": str(tmp_path / "run"),
        }
    )


def test_what_is_made_for_one_model_is_refused_with_another(recipe, other_model, tmp_path, capsys):
    finetune(recipe, progress=False)
    run = tmp_path / "run"
    options = ["--model", str(other_model), "--rank", "2", "--output", str(tmp_path / "new")]
    assert main(["init", *options, "--spectra", str(run / "spectra")]) == 1
    assert "the spectra were measured on another model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["init", *options, "--spectra", str(run / "spectra"), "--force"]) == 0
    adapter = ["--model", str(other_model), "--adapter", str(run / "adapter")]
    assert main(["generate", "hi", *adapter, "--max-new-tokens", "1"]) == 1
    assert f"what is in {run / 'adapter'} was made for another model" in capsys.readouterr().err
    assert main(["generate", "hi", *adapter, "--max-new-tokens", "1", "--force"]) == 0
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert main(["evaluate", *adapter, "--recipe", str(tmp_path / "r.yaml"), "--limit", "2"]) == 1
    assert "was made for another model" in capsys.readouterr().err
    assert main(["evaluate", *adapter, "--recipe", str(tmp_path / "r.yaml"), "--limit", "2", "--force"]) == 0


def test_changed_data_are_named_at_resume(recipe, tmp_path):
    finetune(recipe, progress=False)
    (tmp_path / "run" / "run.json").unlink()  # as if it had been interrupted
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(EvaError, match=r"cannot resume .*: the files of data\.train have changed since the run"):
        finetune(recipe, resume=True, progress=False)
    assert finetune(recipe, resume=True, force=True, progress=False).resumed_from == 2


def test_a_model_that_changed_in_its_folder_is_refused_at_resume(recipe, other_model, tmp_path):
    shutil.copytree(recipe.model.name, tmp_path / "model")
    content = recipe.to_dict() | {"model": str(tmp_path / "model")}
    wanted = Recipe.from_dict(content)
    finetune(wanted, progress=False)
    (tmp_path / "run" / "run.json").unlink()
    shutil.copy(other_model / "model.safetensors", tmp_path / "model" / "model.safetensors")
    with pytest.raises(EvaError, match="was made for another model"):
        finetune(wanted, resume=True, progress=False)


def test_adapters_of_other_libraries_are_let_pass(recipe, tmp_path, capsys):
    finetune(recipe, progress=False)
    kept = json.loads((tmp_path / "run" / "adapter" / "origin.json").read_text())
    assert len(kept["data"]["train"]) == 1
    (tmp_path / "run" / "adapter" / "origin.json").unlink()
    assert main(["generate", "hi", "--adapter", str(tmp_path / "run" / "adapter"), "--max-new-tokens", "1"]) == 0
