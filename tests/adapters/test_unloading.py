"""`unload`: the base model as it was before it got its adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import evatune
from evatune.adapters import unload
from evatune.errors import EvaError


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=60, **sizes)).eval()


def shake(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def check_unchanged(after, before, trainable):
    state = after.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert {name for name, parameter in after.named_parameters() if parameter.requires_grad} == trainable


BATCHES = [{"input_ids": torch.randint(0, 60, (4, 12), generator=torch.Generator().manual_seed(0))} for _ in range(2)]


@pytest.mark.parametrize("method", ["lora", "eva", "pissa", "dora", "vera", "boft"])
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_weights_heads_biases_and_what_was_trained_come_back(method, bias, task_type):
    base = bert()
    base.bert.embeddings.requires_grad_(False)
    before = copy.deepcopy(base.state_dict())
    trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    data = {"batches": BATCHES, "progress": False} if method == "eva" else {}
    model = evatune.prepare(base, method=method, rank=2, bias=bias, task_type=task_type, **data)
    shake(model)
    check_unchanged(unload(model), before, trainable)


def test_taken_off_and_prepared_again():
    base = bert()
    before = copy.deepcopy(base.state_dict())
    for method in ("lora", "milora", "lora"):
        model = evatune.prepare(base, method=method, rank=2)
        shake(model)
        base = unload(model)
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.attn = nn.Linear(8, 16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.inner(x)
        return self.attn(x, x, x, need_weights=False)[0]


def test_attention_weights_do_not_keep_what_passes_have_rounded():
    base = Attending().eval()
    before = copy.deepcopy(base.state_dict())
    model = evatune.prepare(base, method="lora", rank=2).eval()
    shake(model)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(2, 5, 8))
    state = unload(model).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_an_adapter_that_initialize_started_come_back(llama, batches, bias):
    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query", "value"], bias=bias))
    evatune.initialize(model, BATCHES, progress=False)
    shake(model)
    state, before = unload(model).state_dict(), bert().state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_biases_that_nobody_kept_are_not_taken_for_the_old_ones():
    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"], bias="all"))
    with pytest.raises(EvaError, match="evatune did not start this adapter, so there is no copy of them"):
        unload(model)


def test_an_adapter_of_peft_alone_comes_off_with_its_head():
    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    shake(model)
    state, before = unload(model).state_dict(), bert().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
