"""A whole run in Python: files, record, equal data order, resuming."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.on_device import TRAINED_BY_TRAINER
from transformers import Trainer, TrainerCallback

from evatune.errors import EvaError
from evatune.spectra import Spectra
from evatune.tasks.generation import encoding
from evatune.training import RequireEva, RunRecord, finetune
from evatune.training import run as run_module
from evatune.training.trainer import TaskTrainer


def adapter_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def assert_same_adapter(one: str | Path, other: str | Path) -> None:
    first, second = adapter_weights(one), adapter_weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class InterruptAt(TrainerCallback):
    """Press Ctrl-C during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


def interrupt_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    class Interrupted(TaskTrainer):
        def train(self, *args, **kwargs):
            self.add_callback(InterruptAt(step))
            return super().train(*args, **kwargs)

    monkeypatch.setattr(run_module, "TaskTrainer", Interrupted)


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_run_writes_what_it_promises(recipe):
    wanted = recipe(train={"eval_steps": 3, "logging_steps": 4})
    record = finetune(wanted, progress=False)
    folder = Path(wanted.output)

    names = {path.name for path in folder.iterdir()}
    assert names >= {"recipe.yaml", "spectra", "plan.json", "initial_adapter", "adapter", "log.jsonl", "run.json"}
    assert RunRecord.load(folder) == record
    assert record.steps == 6
    assert [entry["step"] for entry in record.losses] == [1, 4, 6]  # the first, every fourth, the last
    assert record.losses[-1]["loss"] < record.losses[0]["loss"]
    assert record.first_grad_norm > 0
    assert [entry["step"] for entry in record.log if "eval_loss" in entry] == [3]
    assert record.after["metrics"]["loss"] < record.before["metrics"]["loss"]
    assert record.before["counts"]["questions"] == 16
    assert record.recipe["adapter"]["rho"] == 2.0
    assert record.versions["torch"] == torch.__version__
    assert {"processor", "cores", "threads", "memory_gib"} <= record.machine.keys()
    assert {"load", "measure", "train", "evaluate"} <= record.seconds.keys()
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry for entry in logged if "loss" in entry] == record.losses

    plan = json.loads((folder / "plan.json").read_text())
    assert record.parameters["components"] == sum(plan["ranks"].values()) == 4 * 14
    spectra = Spectra.load(folder / "spectra")
    down = adapter_weights(folder / "initial_adapter")
    for name, rank in plan["ranks"].items():
        if rank:
            written = down[f"base_model.model.{name}.lora_A.weight"]
            assert torch.equal(written, spectra[name].components[:rank])


def test_trained_adapter_gives_the_evaluated_loss_when_loaded(recipe, tiny_model):
    from evatune.adapters.attach import load_adapter
    from evatune.training.setup import load_base, open_recipe

    wanted = recipe()
    record = finetune(wanted, progress=False)
    task = open_recipe(wanted)
    adapted = load_adapter(load_base(wanted, task), Path(wanted.output) / "adapter")
    assert task.evaluate(adapted)["loss"] == pytest.approx(record.after["metrics"]["loss"], rel=1e-5)


def test_lora_is_uniform_and_sees_the_same_data(recipe, monkeypatch):
    seen: dict[str, list[Any]] = {"eva": [], "lora": []}
    original = encoding.Collator.__call__

    for method in seen:

        def spy(self, rows, method=method):
            seen[method].append([row["input_ids"] for row in rows])
            return original(self, rows)

        monkeypatch.setattr(encoding.Collator, "__call__", spy)
        record = finetune(recipe(method, adapter={"method": method}, data={"eval": []}), progress=False)
    assert len(seen["lora"]) >= 6
    assert seen["eva"][-len(seen["lora"]) :] == seen["lora"]  # before them, EVA's own batches
    assert record.parameters["components"] == 4 * 14
    assert record.before is record.after is None
    assert not (Path(record.recipe["output"]) / "spectra").exists()


@pytest.mark.parametrize("method", ["eva", "lora"])
def test_equal_seed_equal_adapter(recipe, method):
    settings = {"adapter": {"method": method}, "data": {"eval": []}, "train": {"steps": 1}}
    torch.manual_seed(1)
    finetune(recipe("one", **settings), progress=False)
    torch.manual_seed(2)  # what happened before in this process does not matter
    finetune(recipe("two", **settings), progress=False)
    one, two = recipe("one").output, recipe("two").output
    assert_same_adapter(Path(one) / "initial_adapter", Path(two) / "initial_adapter")
    assert_same_adapter(Path(one) / "adapter", Path(two) / "adapter")


def test_resumed_run_equals_uninterrupted_run(recipe, monkeypatch):
    dropout = {"lora_dropout": 0.2}
    train = {"gradient_accumulation": 2, "warmup_ratio": 0.2, "schedule": "cosine"}
    whole = recipe("whole", adapter=dropout, train=train)
    finetune(whole, progress=False)

    parts = recipe("parts", adapter=dropout, train=train)
    with monkeypatch.context() as patched:
        interrupt_in_step(patched, 4)
        with pytest.raises(KeyboardInterrupt):
            finetune(parts, progress=False)
    assert not (Path(parts.output) / "run.json").exists()
    record = finetune(parts, resume=True, progress=False)

    assert record.resumed_from == 4
    assert_same_adapter(Path(whole.output) / "adapter", Path(parts.output) / "adapter")
    steps = [json.loads(line)["step"] for line in (Path(parts.output) / "log.jsonl").read_text().splitlines()]
    assert steps[:-1] == [1, 2, 4, 6]
    before = (Path(parts.output) / "run.json").read_text()
    assert finetune(parts, resume=True, progress=False) == record  # finished: nothing happens
    assert (Path(parts.output) / "run.json").read_text() == before


def test_resume_from_a_periodic_checkpoint(recipe):
    wanted = recipe(train={"save_steps": 2, "keep_checkpoints": 2})
    finetune(wanted, progress=False)
    folder = Path(wanted.output)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    final = adapter_weights(folder / "adapter")
    # As if the machine had died in step 6, while it wrote a checkpoint.
    (folder / "run.json").unlink()
    (folder / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    assert finetune(wanted, resume=True, progress=False).resumed_from == 4
    again = adapter_weights(folder / "adapter")
    assert all(torch.equal(final[name], again[name]) for name in final)


def test_resume_with_another_recipe_is_refused(recipe):
    finetune(recipe(), progress=False)
    with pytest.raises(EvaError, match=r"train\.learning_rate was 0\.005 and is 0\.1"):
        finetune(recipe(train={"learning_rate": 0.1}), resume=True, progress=False)


def test_existing_output_is_kept_unless_overwritten(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(EvaError, match="exists already"):
        finetune(recipe(), progress=False)
    with pytest.raises(EvaError, match=r"holds no recipe\.yaml"):
        finetune(recipe(), overwrite=True, progress=False)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_measured_spectra_are_taken(recipe, tmp_path):
    finetune(recipe("first"), progress=False)
    record = finetune(recipe("second", measure={"spectra": str(tmp_path / "first" / "spectra")}), progress=False)
    assert "measure" not in record.seconds
    assert_same_adapter(tmp_path / "first" / "adapter", tmp_path / "second" / "adapter")


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_gradient_checkpointing_changes_no_weight(recipe):
    plain, saving = recipe("plain"), recipe("saving", train={"gradient_checkpointing": True})
    finetune(plain, progress=False)
    finetune(saving, progress=False)
    first, second = adapter_weights(f"{plain.output}/adapter"), adapter_weights(f"{saving.output}/adapter")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert any(bool(first[name].any()) for name in first if "lora_B" in name)


def test_scores_before_training_may_be_left_out(recipe):
    wanted = recipe(train={"eval_before": False, "steps": 2})
    record = finetune(wanted, progress=False)
    assert record.before is None and record.after is not None
    assert "held-out loss after" in record.summary() and "before" not in record.summary()
    assert not (Path(wanted.output) / "before.json").exists()
    assert "before training" not in (Path(wanted.output) / "adapter" / "README.md").read_text()


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_bf16_trains(recipe):
    record = finetune(recipe(train={"precision": "bf16"}), progress=False)
    assert record.precision == "bf16"
    assert record.losses[-1]["loss"] < record.losses[0]["loss"]


def test_forgotten_eva_is_refused_by_any_trainer(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, TrainingArguments

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights="eva"))
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    data = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    with pytest.raises(EvaError, match="never initialized"):
        Trainer(model=model, args=args, train_dataset=data, callbacks=[RequireEva()]).train()


def test_a_file_that_is_trained_on_and_held_out_is_told(recipe, tiny_data, tmp_path, capsys):
    same = str(tiny_data / "test.jsonl")
    finetune(recipe("both", data={"train": [same], "eval": [same], "max_eval_examples": 2}, train={"steps": 1}))
    assert "note      test.jsonl is trained on and held out: the scores" in capsys.readouterr().err
    finetune(recipe("apart", data={"max_eval_examples": 2}, train={"steps": 1}))
    assert "note" not in capsys.readouterr().err


def test_wrong_spectra_are_told_before_weights_are_loaded(recipe, monkeypatch):
    monkeypatch.setattr("evatune.training.run.load_base", lambda *args: pytest.fail("loaded"))
    with pytest.raises(EvaError, match="nowhere is not a folder of spectra"):
        finetune(recipe(measure={"spectra": "nowhere"}), progress=False)
