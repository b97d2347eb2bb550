"""An adapter that asked for EVA and was never initialized is caught before training."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import evatune
from evatune.adapters import initialized_plan, require_initialized
from evatune.errors import EvaError


def test_forgotten_initialization_is_an_error(llama, lora):
    model = lora(llama(), init_lora_weights="eva")
    with pytest.raises(EvaError, match="adapter 'default' is to start from EVA but was never initialized"):
        require_initialized(model)


@pytest.mark.parametrize("forget", ["eva_config", "init_lora_weights"])
def test_either_setting_asks_for_eva(llama, lora, forget):
    model = lora(llama(), init_lora_weights="eva")
    setattr(model.active_peft_config, forget, None)
    with pytest.raises(EvaError, match="never initialized"):
        require_initialized(model)


def test_forgotten_initialization_is_an_error_if_the_caller_says_so(llama, lora):
    model = lora(llama())
    require_initialized(model)
    with pytest.raises(EvaError, match="never initialized"):
        require_initialized(model, asked=True)


def test_forgotten_adapters_on_meta_are_caught(llama):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="eva")
    with pytest.raises(EvaError, match="never initialized"):
        require_initialized(get_peft_model(llama(), config, low_cpu_mem_usage=True))


def test_rank_one_adapters_are_caught_too(llama, lora):
    with pytest.raises(EvaError, match="never initialized"):
        require_initialized(lora(llama(), r=1, init_lora_weights="eva"))


def test_initialized_adapters_pass_and_remember_their_plan(llama, lora, batches):
    model = lora(llama(), init_lora_weights="eva")
    assert initialized_plan(model) is None
    plan = evatune.initialize(model, batches, progress=False)
    require_initialized(model)
    require_initialized(model, asked=True)
    assert initialized_plan(model) is plan


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("r", [1, 4])
def test_an_initial_adapter_from_disk_passes(llama, lora, batches, tmp_path, whiten, r):
    model = lora(llama(), r=r)
    evatune.initialize(model, batches, rho=2.0, whiten=whiten, progress=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert initialized_plan(loaded) is None
    require_initialized(loaded)
    if r > 1 or not whiten:
        require_initialized(loaded, asked=True)


def test_a_trained_adapter_passes(llama, lora):
    model = lora(llama(), init_lora_weights="eva")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    require_initialized(model)


def test_a_plan_does_not_outlive_its_adapter(llama, lora, batches):
    model = lora(llama())
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear"))
    evatune.initialize(model, batches, adapter_name="second", progress=False)
    model.delete_adapter("second")
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear", init_lora_weights="eva"))
    assert initialized_plan(model, "second") is None
    with pytest.raises(EvaError, match=r"adapter 'second' .* never initialized"):
        require_initialized(model, "second")


def test_a_plan_does_not_follow_a_config_to_another_model(llama, lora, batches):
    model = lora(llama())
    evatune.initialize(model, batches, progress=False)
    assert initialized_plan(get_peft_model(llama(), model.active_peft_config)) is None
