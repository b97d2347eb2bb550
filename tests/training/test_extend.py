"""A run that is made longer, or shorter, when it is resumed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.on_device import TRAINED_BY_TRAINER

from evatune.adapters.attach import load_adapter
from evatune.errors import EvaError
from evatune.models import load_model
from evatune.recipe import load_recipe
from evatune.training import RunRecord, finetune

SHORT = {"data": {"eval": [], "max_length": 64}, "measure": {"max_batches": 1}}


def weights(output):
    return load_file(Path(output) / "adapter" / "adapter_model.safetensors")


def losses(output):
    lines = (Path(output) / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def test_with_a_constant_rate_an_extended_run_is_one_that_was_long_from_the_start(recipe):
    """Weights, optimizer and the order of the data go on; 9 steps of 8 examples are more than an epoch of 60."""

    def of(name, steps):
        return recipe(name, **SHORT, train={"steps": steps, "schedule": "constant", "warmup_ratio": 0, "batch_size": 8})

    whole = finetune(of("whole", 9), progress=False)
    finetune(of("parts", 3), progress=False)
    extended = finetune(of("parts", 9), resume=True, progress=False)

    assert (extended.resumed_from, extended.steps) == (3, 9)
    first, second = weights(whole.recipe["output"]), weights(extended.recipe["output"])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [entry["step"] for entry in losses(extended.recipe["output"])] == [1, 2, 3, 4, 6, 8, 9]


def test_the_learning_rate_of_new_steps_is_that_of_the_new_length(recipe, capsys):
    def of(name, steps):
        return recipe(name, **SHORT, train={"steps": steps, "warmup_ratio": 0, "logging_steps": 1})

    whole = finetune(of("whole", 6), progress=False)
    finetune(of("parts", 2), progress=False)
    assert "length" not in capsys.readouterr().err
    extended = finetune(of("parts", 6), resume=True)

    rates = {entry["step"]: entry["learning_rate"] for entry in whole.losses}
    assert [entry["learning_rate"] for entry in extended.losses][2:] == pytest.approx([rates[s] for s in (3, 4, 5, 6)])
    said = capsys.readouterr().err
    assert f"length    6 steps instead of 2; the learning rate is that of a run of 6 steps, {rates[3]:.1e} at" in said
    folder = Path(extended.recipe["output"])
    assert load_recipe(folder / "recipe.yaml").train.steps == 6
    assert RunRecord.load(folder) == extended == finetune(of("parts", 6), resume=True, progress=False)


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_epochs_extend_too_and_the_scores_before_training_are_kept(recipe):
    settings = {"data": {"max_length": 64, "max_eval_examples": 4}, "measure": {"max_batches": 1}}
    short = {"steps": None, "batch_size": 32}
    first = finetune(recipe(**settings, train=short), progress=False)
    extended = finetune(recipe(**settings, train=short | {"epochs": 2}), resume=True, progress=False)
    assert (first.steps, extended.steps, extended.resumed_from) == (2, 4, 2)
    assert extended.before == first.before
    assert extended.after != first.after


def test_a_run_that_cannot_be_extended_says_why_and_stays_as_it_is(recipe):
    def of(name, steps, keep=1):
        return recipe(name, **SHORT, train={"steps": steps, "keep_checkpoints": keep})

    record = finetune(of("run", 2), progress=False)
    with pytest.raises(EvaError, match=r"run has done 2 steps already; give more --steps than these"):
        finetune(of("run", 1), resume=True, progress=False)
    assert finetune(of("run", 2), resume=True, progress=False) == record
    (Path(record.recipe["output"]) / "run.json").unlink()  # as if it had been interrupted
    with pytest.raises(EvaError, match=r"run has done 2 steps already"):
        finetune(of("run", 1), resume=True, progress=False)

    record = finetune(of("none", 2, keep=0), progress=False)
    assert not (Path(record.recipe["output"]) / "checkpoints").exists()
    with pytest.raises(EvaError, match="none is finished and kept no checkpoint, so it cannot be extended"):
        finetune(of("none", 3, keep=0), resume=True, progress=False)
    assert RunRecord.load(record.recipe["output"]) == record


def test_a_run_that_failed_after_its_last_step_is_finished_by_resuming(recipe):
    wanted = recipe(**SHORT, train={"steps": 2})
    record = finetune(wanted, progress=False)
    before = weights(record.recipe["output"])
    (Path(wanted.output) / "run.json").unlink()
    again = finetune(wanted, resume=True, progress=False)
    after = weights(record.recipe["output"])
    assert (again.steps, again.resumed_from) == (2, 2)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adalora_goes_on_with_the_ranks_that_it_ended_with(recipe):
    def of(steps):
        return recipe(**SHORT, adapter={"method": "adalora"}, train={"steps": steps})

    short = finetune(of(4), progress=False)
    extended = finetune(of(6), resume=True, progress=False)
    assert extended.parameters == short.parameters
    assert (extended.steps, extended.resumed_from) == (6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # PEFT's of the ranks that it keeps itself
        base = load_model(of(6).model.name)
        load_adapter(base, Path(of(6).output) / "adapter")
