"""What every setting of `train:` becomes in the Trainer."""

from __future__ import annotations

import dataclasses

import pytest

from evatune.errors import EvaError
from evatune.recipe import TrainSettings
from evatune.training.arguments import check_processes, total_steps, training_arguments, warmup_steps

# A value of each setting that is not its default, and what it becomes.
ARGUMENTS = {
    "steps": (7, {"max_steps": 7}),
    "epochs": (2.5, {"max_steps": 13}),
    "batch_size": (3, {"per_device_train_batch_size": 3}),
    "gradient_accumulation": (4, {"gradient_accumulation_steps": 4}),
    "learning_rate": (0.25, {"learning_rate": 0.25}),
    "weight_decay": (0.125, {"weight_decay": 0.125}),
    "max_grad_norm": (0.5, {"max_grad_norm": 0.5}),
    "precision": ("bf16", {"bf16": True}),
    "allow_nonfinite": (True, {"logging_nan_inf_filter": True}),
    "logging_steps": (9, {"logging_steps": 9}),
    "eval_steps": (11, {"eval_steps": 11, "eval_strategy": "steps", "do_eval": True}),
    "save_steps": (13, {"save_steps": 13, "save_strategy": "steps"}),
    "keep_checkpoints": (3, {"save_total_limit": 3}),
    "seed": (5, {"seed": 5, "data_seed": 5}),
}
# Not arguments of the Trainer: the optimizer's, the model's, the process's, the run's or the schedule's.
ELSEWHERE = {"lora_plus_ratio", "layer_decay", "gradient_checkpointing", "threads", "schedule", "warmup_ratio"}
ELSEWHERE |= {"final_learning_rate", "eval_before"}


def arguments(tmp_path, **settings):
    plain = {"precision": "fp32"} | settings
    return training_arguments(TrainSettings(**plain), checkpoints=tmp_path, n_examples=40, evaluates=True)


def test_every_setting_is_looked_at():
    assert {field.name for field in dataclasses.fields(TrainSettings)} == ARGUMENTS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_setting_becomes_the_argument_and_nothing_else_changes(tmp_path, name):
    value, expected = ARGUMENTS[name]
    default, changed = arguments(tmp_path), arguments(tmp_path, **{name: value})
    for argument, wanted in expected.items():
        assert getattr(changed, argument) == wanted
        assert getattr(default, argument) != wanted
    differ = {
        field.name
        for field in dataclasses.fields(default)
        if getattr(changed, field.name) != getattr(default, field.name)
    }
    # The number of steps follows from the size of a batch.
    assert differ - {"logging_dir", "run_name"} <= expected.keys() | (
        {"max_steps"} if "batch" in name or "grad" in name else set()
    )


def test_nothing_is_evaluated_without_held_out_data(tmp_path):
    settings = TrainSettings(eval_steps=2)
    assert training_arguments(settings, checkpoints=tmp_path, n_examples=4).eval_strategy == "no"


@pytest.mark.parametrize(
    ("settings", "n_steps"),
    [({}, 5), ({"batch_size": 7}, 6), ({"gradient_accumulation": 2}, 3), ({"epochs": 0.01}, 1), ({"steps": 3}, 3)],
)
def test_steps_of_an_epoch(settings, n_steps):
    assert total_steps(TrainSettings(**settings), n_examples=40) == n_steps


def test_the_warm_up_is_a_share_of_the_steps_rounded_up():
    assert warmup_steps(TrainSettings(warmup_ratio=0.03), n_steps=100) == 3
    assert warmup_steps(TrainSettings(warmup_ratio=0.03), n_steps=101) == 4
    assert warmup_steps(TrainSettings(warmup_ratio=0.0), n_steps=100) == 0


def test_a_launcher_that_wants_the_model_sharded_is_refused(monkeypatch):
    check_processes(TrainSettings())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` does
    with pytest.raises(EvaError, match=r"was configured for FSDP; launch it with torchrun, in 4 bits \(--method"):
        check_processes(TrainSettings())
