"""Numbers that are not finite end a run, with the step named and no weight moved, or are skipped when asked."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.on_device import TRAINED_BY_TRAINER

from evatune.cli.main import main
from evatune.errors import EvaError
from evatune.recipe import Recipe
from evatune.tasks.generation.task import Generation
from evatune.training import finetune


@pytest.fixture
def recipe(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    def build(**train) -> Recipe:
        return Recipe.from_dict(
            {
                "model": str(tiny_model),
                "data": {"train": [str(tiny_data / "train.jsonl")]},
                "adapter": {"method": "lora", "rank": 4},
                "train": {"steps": 5, "batch_size": 4, "precision": "fp32", "logging_steps": 1} | train,
                "output": str(tmp_path / "run"),
            }
        )

    return build


class Poison:
    """Makes the loss, or only the gradient, of chosen steps infinite or no number."""

    def __init__(self, *, steps: set[int], where: str) -> None:
        self.steps, self.where, self.n_passes = steps, where, 0

    def __call__(self, module, inputs, output):
        if not module.training:
            return output
        self.n_passes += 1
        if self.n_passes not in self.steps:
            return output
        if self.where == "loss":
            output.loss = output.loss * math.nan
        else:
            output.loss.register_hook(lambda gradient: gradient * math.inf)
        return output


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch):
    def poison(*, steps: set[int], where: str) -> Poison:
        original, made = Generation.load_model, Poison(steps=steps, where=where)

        def load(self):
            model = original(self)
            model.register_forward_hook(made)
            return model

        monkeypatch.setattr(Generation, "load_model", load)
        return made

    return poison


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", "the loss of step 3 is nan, so the run ends"),
        ("gradient", "the gradient's norm of step 3 is (nan|inf)"),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_the_step_is_named_and_the_run_ends(recipe, poisoned, where, message, max_grad_norm):
    poisoned(steps={3}, where=where)
    wanted = recipe(max_grad_norm=max_grad_norm)
    with pytest.raises(EvaError, match=message + ".*--allow-nonfinite"):
        finetune(wanted, progress=False)
    assert not (Path(wanted.output) / "run.json").exists()
    assert not (Path(wanted.output) / "adapter").exists()


def test_losses_are_read_once_a_step(recipe, poisoned):
    """For every number that the host reads, it waits for the device."""
    poison = poisoned(steps={5}, where="loss")
    with pytest.raises(EvaError, match="the loss of step 3 is nan"):
        finetune(recipe(gradient_accumulation=2), progress=False)
    assert poison.n_passes == 6


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skipped_steps_leave_weights_and_files_finite(recipe, poisoned, where):
    poisoned(steps={1, 3}, where=where)
    wanted = recipe(allow_nonfinite=True, save_steps=2)
    record = finetune(wanted, progress=False)
    folder = Path(wanted.output)
    assert record.steps == 5
    for name in ("adapter/adapter_model.safetensors",):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / name).values())
    assert record.losses[-1]["loss"] < 10
    for path in [*folder.rglob("*.json"), folder / "log.jsonl"]:
        assert "NaN" not in path.read_text() and "Infinity" not in path.read_text(), path


def test_the_command_line_ends_with_exit_code_1(recipe, poisoned, capsys, tmp_path):
    poisoned(steps={2}, where="loss")
    (tmp_path / "recipe.yaml").write_text(recipe().to_yaml())
    assert main(["finetune", str(tmp_path / "recipe.yaml"), "--json"]) == 1
    captured = capsys.readouterr()
    assert "the loss of step 2 is nan" in json.loads(captured.out)["error"]


@pytest.mark.parametrize(
    ("option", "message"),
    [("--learning-rate", "train.learning_rate"), ("--lora-alpha", "adapter.lora_alpha"), ("--rho", "adapter.rho")],
)
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_settings_must_be_finite(capsys, option, message, value):
    assert main(["finetune", option, value]) == 1
    assert f"{message} is '{value}', but must be a number" in capsys.readouterr().err


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_the_first_step_trains(recipe):
    wanted = recipe(steps=1, warmup_ratio=0.5)
    record = finetune(wanted, progress=False)
    assert record.losses[0]["learning_rate"] > 0
    first, last = (
        load_file(Path(wanted.output) / name / "adapter_model.safetensors") for name in ("initial_adapter", "adapter")
    )
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_the_loss_is_logged_where_an_evaluation_falls_on_its_step(recipe, tiny_data):
    wanted = recipe(logging_steps=2, eval_steps=2)
    wanted = Recipe.from_dict(
        wanted.to_dict() | {"data": {"train": wanted.data.train, "eval": [str(tiny_data / "test.jsonl")]}}
    )
    record = finetune(wanted, progress=False)
    assert [entry["step"] for entry in record.losses] == [1, 2, 4, 5]
    assert [entry["step"] for entry in record.log if "eval_loss" in entry] == [2, 4]
