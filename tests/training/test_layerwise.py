"""Layer-wise decay: which layer a parameter stands in, and what it learns with."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from evatune.training.layerwise import layer_depths, layerwise_optimizer


@pytest.fixture
def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, num_labels=2
    )
    return BertForSequenceClassification(config)


def test_depths_of_an_encoder(bert):
    depths = layer_depths(bert)
    assert depths["bert.embeddings.word_embeddings.weight"] == 0
    assert depths["bert.encoder.layer.0.attention.self.query.weight"] == 1
    assert depths["bert.encoder.layer.2.output.dense.bias"] == 3
    assert depths["bert.pooler.dense.weight"] == depths["classifier.bias"] == 4


def test_short_lists_inside_and_beside_the_blocks_do_not_count():
    block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = nn.Sequential()
    model.add_module("stem", nn.ModuleList([nn.Linear(2, 8)]))
    model.add_module("blocks", nn.ModuleList([block, nn.Linear(8, 8)]))
    depths = layer_depths(model)
    assert {name: depth for name, depth in depths.items() if name.endswith("weight")} == {
        "stem.0.weight": 0,
        "blocks.0.0.weight": 1,
        "blocks.0.1.weight": 1,
        "blocks.1.weight": 2,
    }


def test_a_model_without_blocks_learns_with_one_rate():
    assert set(layer_depths(nn.Linear(2, 2)).values()) == {1}


def test_rates_and_weight_decay(bert):
    optimizer = layerwise_optimizer(bert, learning_rate=1e-3, decay=0.75, weight_decay=0.05)
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    layers = bert.bert.encoder.layer
    assert len(settings) == len(list(bert.parameters()))
    assert settings[id(bert.classifier.weight)] == (1e-3, 0.05)
    assert settings[id(bert.classifier.bias)] == (1e-3, 0.0)
    assert settings[id(layers[2].output.dense.weight)] == pytest.approx((1e-3 * 0.75, 0.05))
    assert settings[id(layers[0].output.dense.weight)] == pytest.approx((1e-3 * 0.75**3, 0.05))
    assert settings[id(bert.bert.embeddings.word_embeddings.weight)] == pytest.approx((1e-3 * 0.75**4, 0.05))


def test_frozen_parameters_are_left_out_and_adapters_are_found(bert):
    model = get_peft_model(bert, LoraConfig(target_modules=["query"]))
    optimizer = layerwise_optimizer(model, learning_rate=1.0, decay=0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.125, 0.25, 0.5]
    assert all(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"])
    assert isinstance(optimizer, torch.optim.AdamW)
