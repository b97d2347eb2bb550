"""A few weights tell a model from another, whatever type they are held in and whatever adapter is on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evatune.fingerprint import is_other_model, modules_with_matrices, sampled_weights

ON_HARDWARE = pytest.mark.on_hardware("its weights look like quantized ones, which are not compared")


def model(seed: int, *, n_layers: int = 12) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(n_layers)), nn.LayerNorm(8))


def kept(of: nn.Module) -> dict[str, list[float]]:
    return sampled_weights(of, modules_with_matrices(of))


@ON_HARDWARE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_of_the_weights_makes_no_other_model(dtype):
    assert not is_other_model(kept(model(0)), model(0).to(dtype))
    assert is_other_model(kept(model(0)), model(1).to(dtype))


@ON_HARDWARE
def test_weights_are_kept_as_they_are_whatever_their_types():
    mixed = model(0, n_layers=4)
    for layer, dtype in zip(mixed, (torch.float64, torch.float32, torch.bfloat16, torch.float64), strict=False):
        nn.init.normal_(layer.to(dtype).weight)  # with all digits of float64
    found = kept(mixed)
    assert list(found) == ["0", "1", "2", "3"]
    for name, values in found.items():
        weight = mixed.get_parameter(f"{name}.weight").detach().flatten()
        assert values == [float(weight[(index * 7919 + 13) % 64]) for index in range(3)]


@ON_HARDWARE
def test_a_fine_tuned_model_is_another_one():
    tuned = model(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.02)
    assert is_other_model(kept(model(0)), tuned)


def test_an_adapter_on_the_model_makes_no_other_one():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model(0), LoraConfig(r=2, target_modules=["0", "1"])).get_base_model()
    assert not is_other_model(kept(model(0)), adapted)


def test_new_heads_are_left_out():
    assert modules_with_matrices(model(0, n_layers=3), without=("2",)) == ["0", "1"]
    assert not is_other_model({}, model(0))
