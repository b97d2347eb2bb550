"""Which spectra start which layers: of more targets, of targets that no batch reached, of other models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import evatune
from evatune import EvaError, EvaWarning, Spectra
from evatune.adapters.as_in_peft import initialize_lora_eva_weights
from evatune.adapters.lora import find_adapter


class Towers(nn.Module):
    """Two towers; batches of one of them leave the other alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.image = nn.Linear(8, 8), nn.Linear(8, 8)
        self.top = nn.Linear(8, 8)

    def forward(self, text=None, image=None):
        return self.top(self.image(image) if text is None else self.text(text))


BATCHES = [{"text": torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]


def wrapped(*, low=False, **settings):
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["text", "image", "top"], **settings)
    return get_peft_model(Towers(), config, low_cpu_mem_usage=low)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("given", ["batches", "spectra", "saved spectra"])
def test_what_no_batch_reaches_keeps_rank_and_random_start_outside_the_budget(tmp_path, low, given):
    source = BATCHES
    if given != "batches":
        with pytest.warns(EvaWarning, match="1 of 3 targets got no input"):
            source = evatune.measure(Towers(), BATCHES, n_components=6, progress=False)
        assert source.unreached == ("image",)
        if given == "saved spectra":
            source = Spectra.load(source.save(tmp_path / "spectra"))
    model = wrapped(low=low)
    with pytest.warns(EvaWarning, match=r"1 of 3 (targets|layers) got no input .*'image'"):
        plan = evatune.initialize(model, source, **({"progress": False} if given == "batches" else {}))
    assert list(plan.ranks) == ["text", "top"] and plan.budget == plan.total == 6
    layer = find_adapter(model, "default")[2]["image"]
    assert (layer.r["default"], layer.scaling["default"]) == (3, 2.0)
    rows = layer.lora_A["default"].weight
    assert rows.abs().max() <= 8**-0.5 and rows.any() and not layer.lora_B["default"].weight.any()
    model.save_pretrained(tmp_path / "adapter")
    again = find_adapter(PeftModel.from_pretrained(Towers(), tmp_path / "adapter"), "default")[2]
    assert torch.equal(again["image"].lora_A["default"].weight, rows)


def test_so_does_a_layer_whose_rows_are_all_masked():
    def mask(batch):
        return {"text": torch.zeros(20, dtype=torch.bool), "image": None, "top": None}

    model = wrapped()
    with pytest.warns(EvaWarning, match=r"2 of 3 targets got no input or only rows that are masked .*'text'"):
        plan = evatune.initialize(model, BATCHES, row_mask=mask, progress=False)
    assert plan.ranks == {"top": 3}
    assert find_adapter(model, "default")[2]["text"].r["default"] == 3


def test_a_layer_that_was_never_a_target_is_not_taken_for_unreached():
    spectra = evatune.measure(Towers(), BATCHES, n_components=6, target_modules=["text", "top"], progress=False)
    with pytest.raises(EvaError, match=r"1 of its layers not in the spectra: image"):
        evatune.initialize(wrapped(), spectra)
    only = replace(spectra, targets={}, unreached=("text", "image", "top"))
    with pytest.raises(EvaError, match="none of its layers was reached"):
        evatune.initialize(wrapped(), only)


@pytest.fixture(scope="module")
def of_another_model():
    """Spectra of a model of the same sizes with other weights."""
    other = Towers()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return evatune.measure(other, BATCHES, n_components=6, target_modules=["text", "top"], progress=False)


REFUSED = r"the spectra were measured on another model \(Towers\): the weights differ; .* force=True \(--force\)"


@pytest.mark.on_hardware("its weights look like quantized ones, which are not compared")
def test_spectra_of_another_model_start_an_adapter_only_if_forced(of_another_model):
    def adapted():
        return get_peft_model(Towers(), LoraConfig(r=3, target_modules=["text", "top"]))

    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for call in (evatune.initialize, initialize_lora_eva_weights):
        with pytest.raises(EvaError, match=REFUSED):
            call(model, of_another_model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    forced = evatune.initialize(model, of_another_model, force=True)
    assert forced == evatune.initialize(adapted(), replace(of_another_model, weights={}))


@pytest.mark.on_hardware("its weights look like quantized ones, which are not compared")
def test_prepare_refuses_them_before_it_changes_the_model(of_another_model):
    settings = {"rank": 3, "target_modules": ["text", "top"], "spectra": of_another_model}
    model = Towers()
    with pytest.raises(EvaError, match=REFUSED):
        evatune.prepare(model, **settings)
    assert not hasattr(model, "peft_config")
    assert isinstance(evatune.prepare(model, force=True, **settings), PeftModel)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_the_bias_of_a_layer_without_rank_is_frozen_where_it_is_trained_for_the_adapter_only(bias):
    spectra = evatune.measure(Towers(), BATCHES, n_components=6, target_modules=["text", "top"], progress=False)
    key = spectra.targets["top"].input
    spectra.inputs[key] = replace(spectra.inputs[key], total_variance=1e12)
    model = get_peft_model(Towers(), LoraConfig(r=3, target_modules=["text", "top"], bias=bias))
    assert evatune.initialize(model, spectra).ranks == {"text": 6, "top": 0}
    base = model.get_base_model()
    assert isinstance(base.top, nn.Linear)
    assert base.top.bias.requires_grad == (bias == "all")
    assert base.text.base_layer.bias.requires_grad


@pytest.mark.parametrize("method", ["lora", "eva", "pissa", "milora", "olora"])
@pytest.mark.parametrize("norm", [weight_norm, nn.utils.weight_norm], ids=["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm:FutureWarning")
def test_a_weight_that_is_computed_is_refused_in_one_sentence(method, norm):
    model = nn.Sequential(nn.Linear(8, 8), norm(nn.Linear(8, 8)))
    options = {"batches": [torch.randn(20, 8)], "progress": False} if method == "eva" else {}
    with pytest.raises(EvaError, match=r"weight of '1' is computed anew in every call .*; call torch.*or leave it out"):
        evatune.prepare(model, method=method, rank=2, **options)
    assert [type(module).__name__.removeprefix("Parametrized") for module in model] == ["Linear", "Linear"]
