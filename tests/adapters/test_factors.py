"""Where PEFT keeps A and B, and how they are written there, one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import evatune
from evatune import EvaError
from evatune.adapters.factors import ConvolutionFactors, EmbeddingFactors, Factors, assign, factors_of, working_device
from evatune.adapters.lora import find_adapter


@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_a_convolution_s_a_and_b_say_their_new_rank(lora, n_dims):
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n_dims - 1]
    model = lora(nn.Sequential(convolution(2, 5, 3)), target_modules=["0"], lora_bias=True)
    layer = find_adapter(model, "default")[2]["0"]
    (pair,) = factors_of(layer, "default")
    assert type(pair) is ConvolutionFactors
    assert pair.width == 2 * 3**n_dims
    pair.up.bias.data.fill_(1.0)
    rows = torch.randn(7, pair.width)
    pair.write(rows)
    assert (pair.down.out_channels, pair.up.in_channels) == (7, 7)
    assert pair.down_weight.shape == (7, 2, *[3] * n_dims)
    assert torch.equal(pair.blocks()[0], rows)
    assert pair.up_weight.shape == (5, 7, *[1] * n_dims)
    assert not pair.up_weight.any()
    assert not pair.up.bias.any()
    x = torch.randn(1, 2, *[4] * n_dims)
    assert torch.equal(model(x), model.get_base_model()[0].base_layer(x))


def test_a_linear_layer_s_a_and_b_say_their_new_rank(lora):
    model = lora(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], lora_bias=True)
    (pair,) = factors_of(find_adapter(model, "default")[2]["0"], "default")
    assert type(pair) is Factors
    down, up = pair.down_weight, pair.up_weight
    pair.up.bias.data.fill_(1.0)
    rows = torch.randn(6, 3).T
    pair.write(rows)
    assert pair.down_weight is down and pair.up_weight is up  # an optimizer that has them goes on
    assert (pair.down.out_features, pair.up.in_features, pair.width) == (3, 3, 6)
    assert torch.equal(down, rows)
    assert not up.any() and up.shape == (5, 3)
    assert not pair.up.bias.any()


def test_an_embedding_s_a_is_a_row_of_tokens(lora):
    model = lora(nn.Sequential(nn.Embedding(9, 4)), target_modules=["0"])
    (pair,) = factors_of(find_adapter(model, "default")[2]["0"], "default")
    assert type(pair) is EmbeddingFactors
    rows = torch.randn(2, 9)
    pair.write(rows)
    assert pair.width == 9
    assert torch.equal(pair.down_weight, rows)
    assert pair.up_weight.shape == (4, 2) and not pair.up_weight.any()


def test_what_is_assigned_keeps_dtype_and_forgets_gradients():
    owner = nn.Linear(4, 3, dtype=torch.bfloat16)
    parameter = owner.weight
    parameter.grad = torch.ones_like(parameter)
    assign(owner, "weight", torch.randn(2, 5).T, device=torch.device("cpu"))
    assert owner.weight is parameter
    assert (parameter.shape, parameter.dtype) == ((5, 2), torch.bfloat16)
    assert parameter.is_contiguous()  # safetensors refuses other layouts
    assert parameter.grad is None


@pytest.mark.parametrize("trainable", [True, False])
def test_a_parameter_without_memory_gets_some_where_the_layer_computes(trainable):
    owner = nn.Linear(4, 3, dtype=torch.bfloat16, device="meta")
    owner.weight.requires_grad_(trainable)
    assign(owner, "weight", torch.ones(2, 4), device=torch.device("cpu"))
    assert (owner.weight.device.type, owner.weight.dtype) == ("cpu", torch.bfloat16)
    assert owner.weight.requires_grad is trainable
    other = nn.Linear(4, 3, device="meta")
    assign(other, "weight", torch.ones(2, 4), device=torch.device("meta"))
    assert other.weight.device.type == "meta"


def test_a_layer_computes_where_its_weight_is_or_where_accelerate_brings_it():
    def where(hook=None, *, is_meta=True):
        base = nn.Module()
        if hook is not None:
            base._hf_hook = hook
        layer = SimpleNamespace(get_base_layer=lambda: base)
        return str(working_device(layer, SimpleNamespace(is_meta=is_meta, device=torch.device("cuda:1"))))

    to_3 = SimpleNamespace(execution_device="cuda:3")
    assert where(is_meta=False) == where(to_3, is_meta=False) == "cuda:1"
    assert where() == "cpu"
    assert where(to_3) == "cuda:3"
    assert where(SimpleNamespace(hooks=[SimpleNamespace(), SimpleNamespace(execution_device=None), to_3])) == "cuda:3"
    assert where(SimpleNamespace(hooks=[SimpleNamespace()])) == "cpu"


def test_a_dilation_in_one_direction_is_refused_too(lora):
    model = lora(nn.Sequential(nn.Conv2d(4, 4, 3, dilation=(1, 2))), target_modules=["0"])
    with pytest.raises(EvaError, match=r"'0' is a convolution with dilation=\(1, 2\), which PEFT's adapter does not"):
        evatune.initialize(model, [torch.randn(2, 4, 8, 8)])
