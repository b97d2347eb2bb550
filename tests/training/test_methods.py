"""Whole runs by every kind of method: what differs from plain LoRA and EVA."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from evatune.adapters.attach import load_adapter
from evatune.errors import EvaError
from evatune.models import load_model
from evatune.recipe import Recipe
from evatune.tasks.generation import evaluate
from evatune.training import finetune
from evatune.training import run as run_module
from evatune.training.setup import load_held_out_data, load_pretrained


@pytest.fixture
def recipe(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def build(method: str, *, name: str = "run", **sections: dict[str, Any]) -> Recipe:
        content: dict[str, Any] = {
            "model": {"name": str(tiny_model)},
            "data": {"train": [str(tiny_data / "train.jsonl")], "eval": [str(tiny_data / "test.jsonl")]},
            "adapter": {"rank": 4, "method": method},
            "measure": {"max_batches": 3, "gradient_batches": 2},
            "train": {"steps": 4, "batch_size": 4, "precision": "fp32", "logging_steps": 1, "learning_rate": 5e-3},
            "output": str(tmp_path / name),
        }
        for section, values in sections.items():
            content[section] = content[section] | values
        return Recipe.from_dict(content)

    return build


METHODS = ["pissa", "milora", "lora-ga", "corda", "lora-one", "adalora", "vera", "eva-grad", "eva-minor", "lora-redist"]


@pytest.mark.parametrize("method", [*METHODS, "eva-raw+dora", "eva+lora+", "pissa+rslora"])
def test_one_word_changes_the_method_and_what_is_saved_loads_on_the_base(recipe, method):
    wanted = recipe(method)
    record = finetune(wanted, progress=False)
    assert record.losses[-1]["loss"] < record.losses[0]["loss"] + 0.05
    assert record.parameters["targets"] == 14
    model, tokenizer = load_pretrained(wanted)
    examples = load_held_out_data(wanted, tokenizer)
    if method != "lora-one":
        assert evaluate(model, examples, tokenizer).loss == pytest.approx(record.before["loss"], rel=1e-4)
    adapted = load_adapter(model, Path(wanted.output) / "adapter")
    assert evaluate(adapted, examples, tokenizer).loss == pytest.approx(record.after["loss"], rel=1e-4)


def test_full_fine_tuning_saves_a_model(recipe):
    wanted = recipe("full", train={"learning_rate": 1e-3})
    record = finetune(wanted, progress=False)
    assert record.parameters["trainable"] == record.parameters["base"]
    folder = Path(wanted.output)
    assert not (folder / "adapter").exists()
    assert not (folder / "initial_adapter").exists()
    _, tokenizer = load_pretrained(wanted)
    trained = evaluate(load_model(str(folder / "model")), load_held_out_data(wanted, tokenizer), tokenizer)
    assert trained.loss == pytest.approx(record.after["loss"], rel=1e-5)


def test_a_frozen_a_is_as_it_started(recipe, tmp_path):
    from safetensors.torch import load_file

    wanted = recipe("eva", adapter={"train_a": False})
    finetune(wanted, progress=False)
    first, last = (
        load_file(Path(wanted.output) / folder / "adapter_model.safetensors")
        for folder in ("initial_adapter", "adapter")
    )
    assert all(torch.equal(first[name], last[name]) == (".lora_A." in name) for name in first)


class InterruptAt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("method", ["pissa", "lora-ga", "full", "eva+lora+"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(recipe, monkeypatch, method):
    whole = finetune(recipe(method, name="whole"), progress=False)

    class Interrupted(Trainer):
        def train(self, *args, **kwargs):
            self.add_callback(InterruptAt())
            return super().train(*args, **kwargs)

    halved = recipe(method, name="halved")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "Trainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(halved, progress=False)
    resumed = finetune(halved, progress=False, resume=True)
    assert resumed.resumed_from == 2
    assert resumed.losses[-1]["loss"] == pytest.approx(whole.losses[-1]["loss"], rel=1e-5)
    assert resumed.after["loss"] == pytest.approx(whole.after["loss"], rel=1e-5)


def test_adalora_cuts_directions_in_time(recipe, monkeypatch):
    steps = []
    original = run_module.AdaLoraCallback.on_optimizer_step

    def spy(self, args, state, control, **kwargs):
        model = kwargs["model"]
        assert any(parameter.grad is not None for parameter in model.parameters())
        original(self, args, state, control, **kwargs)
        kept = [int((p != 0).sum()) for name, p in model.named_parameters() if ".lora_E." in name]
        steps.append((state.global_step, sum(kept)))

    monkeypatch.setattr(run_module.AdaLoraCallback, "on_optimizer_step", spy)
    wanted = recipe("adalora", train={"steps": 10})
    record = finetune(wanted, progress=False)
    config = json.loads((Path(wanted.output) / "adapter" / "adapter_config.json").read_text())
    assert (config["init_r"], config["target_r"], config["total_step"]) == (8, 4, 10)
    assert [step for step, _ in steps] == list(range(10))
    kept = sum(sum(mask) for mask in config["rank_pattern"].values())
    assert kept <= 4 * 14  # from 8 * 14 down to the budget
    assert record.after["loss"] < record.before["loss"]


def test_loraplus_has_a_higher_rate_for_b(recipe, monkeypatch):
    groups = []

    class Watched(Trainer):
        def train(self, *args, **kwargs):
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            for group in self.optimizer.param_groups:
                groups.append(
                    (group["lr"], group["weight_decay"], {names[id(p)].split(".")[-3] for p in group["params"]})
                )
            return super().train(*args, **kwargs)

    monkeypatch.setattr(run_module, "Trainer", Watched)
    train = {"learning_rate": 1e-3, "lora_plus_ratio": 4, "weight_decay": 0.1}
    finetune(recipe("lora+", train=train), progress=False)
    assert [group for group in groups if group[2]] == [(1e-3, 0.1, {"lora_A"}), (4e-3, 0.1, {"lora_B"})]


def test_spectra_that_a_method_has_no_use_for_are_left_alone(recipe):
    finetune(recipe("eva", name="first"), progress=False)
    spectra = str(Path(recipe("eva", name="first").output) / "spectra")
    for method in ("lora", "eva-grad", "lora-redist"):
        finetune(recipe(method, name=method, measure={"spectra": spectra}), progress=False)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("pisa", r"adapter.method: there is no method 'pisa' \(did you mean 'pissa'"),
        ("full+dora", "adapter.method: method"),
    ],
)
def test_a_senseless_method_is_refused_with_the_recipe(recipe, method, message):
    with pytest.raises(EvaError, match=message):
        recipe(method)
