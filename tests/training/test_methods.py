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
from safetensors.torch import load_file
from tests.on_device import TRAINED_BY_TRAINER
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import evatune
from evatune.adapters.adalora import allocator_state, restore_allocator
from evatune.adapters.attach import load_adapter
from evatune.errors import EvaError
from evatune.models import load_model
from evatune.recipe import Recipe
from evatune.spectra import Spectra
from evatune.training import finetune
from evatune.training import run as run_module
from evatune.training.adalora import AdaLoraCallback
from evatune.training.setup import (
    load_base,
    measure_recipe,
    open_recipe,
    quantize_as_asked,
)
from evatune.training.trainer import TaskTrainer


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
    task = open_recipe(wanted)
    model = load_base(wanted, task)
    if method != "lora-one":
        assert task.evaluate(model)["loss"] == pytest.approx(record.before["metrics"]["loss"], rel=1e-4)
    adapted = load_adapter(model, Path(wanted.output) / "adapter")
    assert task.evaluate(adapted)["loss"] == pytest.approx(record.after["metrics"]["loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["eva", "lora"])
def test_every_setting_of_targets_reaches_the_adapter(recipe, method):
    wanted = recipe(method, adapter={"layers_to_transform": (1,)})
    finetune(wanted, progress=False)
    saved = load_file(Path(wanted.output) / "adapter" / "adapter_model.safetensors")
    layers = {name.split(".layers.")[1].split(".")[0] for name in saved}
    assert layers == {"1"}


def test_full_fine_tuning_saves_a_model(recipe):
    wanted = recipe("full", train={"learning_rate": 1e-3})
    record = finetune(wanted, progress=False)
    assert record.parameters["trainable"] == record.parameters["base"]
    folder = Path(wanted.output)
    assert not (folder / "adapter").exists()
    assert not (folder / "initial_adapter").exists()
    trained = open_recipe(wanted).evaluate(load_model(str(folder / "model")))
    assert trained["loss"] == pytest.approx(record.after["metrics"]["loss"], rel=1e-5)


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_a_frozen_a_is_as_it_started(recipe, tmp_path):
    wanted = recipe("eva", adapter={"train_a": False, "budget": "parameters"})
    record = finetune(wanted, progress=False)
    plan = json.loads((Path(wanted.output) / "plan.json").read_text())
    assert record.parameters["trainable"] == plan["n_parameters"] <= plan["uniform_parameters"]
    first, last = (
        load_file(Path(wanted.output) / folder / "adapter_model.safetensors")
        for folder in ("initial_adapter", "adapter")
    )
    assert all(torch.equal(first[name], last[name]) == (".lora_A." in name) for name in first)


@pytest.mark.on_hardware("bitsandbytes does not know it")
def test_eva_beside_4_bits_measures_the_model_that_will_run(recipe, tmp_path):
    spectra = {}
    for method in ("eva", "eva+qlora"):
        finetune(recipe(method, name=method), progress=False)
        spectra[method] = Spectra.load(tmp_path / method / "spectra")
    wanted = recipe("eva+qlora")
    task = open_recipe(wanted)
    model = load_base(wanted, task)
    quantize_as_asked(wanted, model, task.needs(model))
    expected = measure_recipe(wanted, model, task=task, progress=False)
    for name, spectrum in spectra["eva+qlora"].items():
        assert torch.equal(spectrum.components, expected[name].components)
    last = "model.layers.1.mlp.down_proj"
    assert not torch.allclose(spectra["eva"][last].singular_values, expected[last].singular_values, rtol=1e-3)


class InterruptAt(TrainerCallback):
    """Press Ctrl-C during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


def interrupt(wanted: Recipe, monkeypatch: pytest.MonkeyPatch, *, step: int) -> None:
    """Run until a step, as if Ctrl-C was pressed in it."""

    class Interrupted(TaskTrainer):
        def train(self, *args, **kwargs):
            self.add_callback(InterruptAt(step))
            return super().train(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "TaskTrainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(wanted, progress=False)


@pytest.mark.parametrize(
    "method",
    [
        "pissa",
        "lora-ga",
        "full",
        "eva+lora+",
        pytest.param("eva+qlora", marks=pytest.mark.on_hardware("bitsandbytes does not know it")),
    ],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(recipe, monkeypatch, method):
    whole = finetune(recipe(method, name="whole"), progress=False)
    halved = recipe(method, name="halved")
    interrupt(halved, monkeypatch, step=2)
    resumed = finetune(halved, progress=False, resume=True)
    assert resumed.resumed_from == 2
    assert resumed.losses[-1]["loss"] == pytest.approx(whole.losses[-1]["loss"], rel=1e-5)
    assert resumed.after["metrics"]["loss"] == pytest.approx(whole.after["metrics"]["loss"], rel=1e-5)


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_adalora_cuts_directions_in_time(recipe, monkeypatch):
    steps = []
    original = AdaLoraCallback.on_optimizer_step

    def spy(self, args, state, control, **kwargs):
        model = kwargs["model"]
        assert any(parameter.grad is not None for parameter in model.parameters())
        original(self, args, state, control, **kwargs)
        kept = [int((p != 0).sum()) for name, p in model.named_parameters() if ".lora_E." in name]
        steps.append((state.global_step, sum(kept)))

    monkeypatch.setattr(AdaLoraCallback, "on_optimizer_step", spy)
    wanted = recipe("adalora", train={"steps": 10})
    record = finetune(wanted, progress=False)
    config = json.loads((Path(wanted.output) / "adapter" / "adapter_config.json").read_text())
    assert (config["init_r"], config["target_r"], config["total_step"]) == (8, 4, 10)
    assert [step for step, _ in steps] == list(range(10))
    kept = sum(sum(mask) for mask in config["rank_pattern"].values())
    assert kept <= 4 * 14  # from 8 * 14 down to the budget
    assert record.after["metrics"]["loss"] < record.before["metrics"]["loss"]


@pytest.mark.parametrize("step", [2, 6, 11], ids=["before cutting", "while cutting", "after the last cut"])
def test_adalora_goes_on_with_the_same_scores_and_the_same_cuts(recipe, monkeypatch, step):
    train = {"steps": 12, "learning_rate": 2e-2}
    whole, halved = (recipe("adalora", name=name, train=train) for name in ("whole", "halved"))
    uninterrupted = finetune(whole, progress=False)
    interrupt(halved, monkeypatch, step=step)
    resumed = finetune(halved, progress=False, resume=True)
    assert resumed.resumed_from == step
    assert resumed.log == uninterrupted.log
    first, second = (Path(folder.output) / "adapter" for folder in (whole, halved))
    masks = [json.loads((folder / "adapter_config.json").read_text())["rank_pattern"] for folder in (first, second)]
    assert masks[0] == masks[1]
    assert 0 < sum(map(sum, masks[0].values())) <= 4 * 14
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adalora_checkpoint_without_scores_is_not_complete(recipe, monkeypatch, tmp_path):
    wanted = recipe("adalora", train={"steps": 6})
    interrupt(wanted, monkeypatch, step=4)
    checkpoint = Path(wanted.output) / "checkpoints" / "checkpoint-4"
    (checkpoint / "adalora.safetensors").unlink()
    args, control = TrainingArguments(output_dir=str(tmp_path / "else")), TrainerControl()
    for callback, folder in ((AdaLoraCallback(), "else/checkpoint-4"), (AdaLoraCallback(checkpoint), str(checkpoint))):
        callback.on_train_begin(args, TrainerState(), control, model=None)  # a new training needs none
        with pytest.raises(EvaError, match=f"{folder} holds no adalora.safetensors, .* go on as planned"):
            callback.on_train_begin(args, TrainerState(global_step=4), control, model=None)
    assert finetune(wanted, progress=False, resume=True).resumed_from is None  # as if it had not been written


def test_adalora_scores_of_another_adapter_are_refused(tiny_model):
    models = [
        evatune.prepare(load_model(str(tiny_model)), method="adalora", rank=rank, total_steps=8) for rank in (2, 3)
    ]
    state = allocator_state(models[0], {"model.layers.0.mlp.up_proj.lora_E.default": [True] * 6})
    assert restore_allocator(models[0], state) == {"model.layers.0.mlp.up_proj.lora_E.default": [True] * 6}
    assert restore_allocator(models[1], {}) is None
    with pytest.raises(EvaError, match=r"of another adapter: 'model.layers.0.mlp.up_proj.lora_E.default' is not a"):
        restore_allocator(models[1], state)
    with pytest.raises(EvaError, match=r"of another adapter: 'nowhere' is not a weight of this size here"):
        restore_allocator(models[0], {"kept/nowhere": torch.ones(6)})
    name = "model.layers.0.mlp.up_proj.lora_E.default"
    with pytest.raises(EvaError, match="of another adapter"):
        restore_allocator(models[0], {f"budget/{name}": torch.ones(6)})


def test_loraplus_has_a_higher_rate_for_b(recipe, monkeypatch):
    groups = []

    class Watched(TaskTrainer):
        def create_optimizer(self, model=None):
            made = super().create_optimizer(model)
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            for group in made.param_groups:
                groups.append(
                    (group["lr"], group["weight_decay"], {names[id(p)].split(".")[-3] for p in group["params"]})
                )
            return made

    monkeypatch.setattr(run_module, "TaskTrainer", Watched)
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
