"""QLoRA: what merging, taking off and dequantizing do to weights in 4 bits."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import nn

import evatune
from evatune import EvaError
from evatune.adapters import save_adapter, unload
from evatune.adapters.attach import load_adapter
from evatune.adapters.four_bits import dequantize_targets, quantize_targets, quantized_bytes
from evatune.adapters.lora import find_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*4-bit linear may get different generations:UserWarning:peft"),
    pytest.mark.on_hardware("bitsandbytes does not know it"),
]


@pytest.fixture
def trained(llama, batches):
    """Return a function that makes a QLoRA model whose adapter is not zero."""

    def build(method: str = "qlora") -> PeftModel:
        options = {"batches": batches, "progress": False} if method.startswith("eva") else {}
        model = evatune.prepare(llama(), method=method, rank=4, lora_alpha=8, **options).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    return build


def dequantized(layer) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("method", ["qlora", "eva+qlora", "dora+qlora"])
def test_taking_the_adapter_off_gives_the_4_bit_base_back_bit_for_bit(llama, trained, method):
    base = llama()
    quantize_targets(base, target_modules="all-linear")
    bare = unload(trained(method))
    assert type(bare.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit
    before, after = base.state_dict(), bare.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("method", ["qlora", "eva+qlora", "dora+qlora"])
def test_the_adapter_beside_a_4_bit_base_comes_back_exactly(llama, trained, batches, outputs, tmp_path, method):
    model = trained(method)
    save_adapter(model, tmp_path / "adapter")
    base = llama()
    quantize_targets(base, target_modules="all-linear")
    loaded = load_adapter(base, tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded, batches[0]), outputs(model, batches[0]))


def test_merging_into_4_bits_rounds_the_update_away(trained, batches, outputs):
    """Each weight is right to one rounding, and the adapter's change is smaller than that."""
    model = trained()
    expected = outputs(model, batches[0])
    start = outputs(unload(trained()), batches[0])
    wanted = {
        name: dequantized(layer.get_base_layer()) + layer.get_delta_weight("default")
        for name, layer in find_adapter(model, "default")[2].items()
    }
    merged = copy.deepcopy(model).merge_and_unload()
    for name, weight_oi in wanted.items():
        layer = merged.get_submodule(name)
        assert type(layer) is bnb.nn.Linear4bit
        blocks = weight_oi.flatten().split(64)
        error = (dequantized(layer) - weight_oi).abs().flatten().split(64)
        # Half of NF4's widest gap is 0.152 of a block's largest entry, and that entry is itself kept in 8 bits.
        assert all(e.max() < 0.17 * block.abs().max() for e, block in zip(error, blocks, strict=True))
    lost = (outputs(merged, batches[0]) - expected).abs().mean() / (expected - start).abs().mean()
    assert 0.3 < lost < 1.5


def test_a_dequantized_base_takes_the_adapter_without_loss(llama, trained, batches, outputs, tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "adapter")
    base = llama()
    base.model.layers[0].mlp.up_proj.train()
    quantize_targets(base, target_modules="all-linear")
    in_four_bits = outputs(base, batches[0])
    assert base.is_loaded_in_4bit
    dequantize_targets(base)
    assert not base.is_loaded_in_4bit
    assert type(base.model.layers[0].mlp.up_proj) is nn.Linear
    assert base.model.layers[0].mlp.up_proj.training and not base.model.layers[1].mlp.up_proj.training
    torch.testing.assert_close(outputs(base, batches[0]), in_four_bits, rtol=1e-4, atol=1e-4)
    merged = load_adapter(base, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(outputs(merged, batches[0]), outputs(model, batches[0]), rtol=1e-4, atol=1e-4)


def test_biases_and_dtypes_pass_through_4_bits():
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16), nn.Linear(32, 64, bias=False, dtype=torch.bfloat16))
    bias = model[0].bias
    weight = model[0].weight.detach().clone()
    quantize_targets(model, target_modules=["0", "1"])
    quantize_targets(model, target_modules=["0", "1"])  # what is in 4 bits already is left alone
    assert model[0].weight.quant_state.quant_type == "nf4"
    packed = dequantized(model[0])
    dequantize_targets(model)
    assert model[0].bias is bias
    assert model[1].bias is None
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, packed)
    assert (model[0].weight - weight).abs().max() < 0.17 * weight.abs().max()


def test_what_cannot_be_dequantized_is_refused(llama, trained):
    with pytest.raises(EvaError, match="takes a base model: save the adapter"):
        dequantize_targets(trained())
    with pytest.raises(EvaError, match="no layer of the model is in 4 bits"):
        dequantize_targets(llama())
    model = llama()
    model.hf_quantizer = object()
    with pytest.raises(EvaError, match=r"call model\.dequantize\(\)"):
        dequantize_targets(model)


def test_layers_that_are_not_linear_cannot_be_held_in_4_bits(gpt2):
    with pytest.raises(EvaError, match=r"is a Conv1D; qlora holds nn\.Linear weights in 4 bits only"):
        evatune.prepare(gpt2(), method="qlora", rank=4)


def test_bytes_in_four_bits_are_those_of_bitsandbytes():
    model = nn.Sequential(nn.Linear(320, 192, bias=False))
    quantize_targets(model, target_modules=["0"])
    weight = model[0].weight
    state = weight.quant_state
    held = [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert quantized_bytes(320 * 192) == pytest.approx(sum(tensor.nbytes for tensor in held), abs=8)
