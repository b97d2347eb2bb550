"""What a setting means where PEFT's own rules are silent: names that match nothing, fused experts, attention, heads."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from evatune import EvaError
from evatune.activations.layers.targets import TargetRules, find_targets

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}


def names(model, **settings):
    return [target.name for target in find_targets(model, TargetRules(**settings))]


def in_layer(model, number, **settings):
    prefix = f"model.layers.{number}."
    return {name.removeprefix(prefix) for name in names(model, **settings) if name.startswith(prefix)}


@pytest.fixture
def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


@pytest.fixture
def deepseek():
    """One dense layer, then one of experts with shared experts beside them."""
    sizes = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
    heads = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
    config = DeepseekV3Config(**SIZES, **sizes, **heads, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4)
    return DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, r"'v_prj' in target_modules matches no .*did you mean 'v_proj'"),
        ({"exclude_modules": ["q_prj"]}, r"'q_prj' in exclude_modules matches no .*did you mean 'q_proj'"),
        ({"exclude_modules": r".*\.q_prj"}, r"exclude_modules='\.\*\\\\\.q_prj' matches no module"),
        ({"exclude_modules": ["mlp"]}, r"'mlp' in exclude_modules names a part .* '\(\.\*\\\.\)\?mlp\\\.\.\*' instead"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, r"no target is in a layer with the number 7"),
        ({"layers_to_transform": 7}, r"all-linear' with layers_to_transform=7"),
        ({"target_modules": r".*q_proj", "layers_to_transform": [0]}, r"not with the regular expression '\.\*q_proj'"),
    ],
)
def test_what_matches_nothing_is_named(build, settings, message):
    with pytest.raises(EvaError, match=message):
        names(build("llama"), **settings)


def test_what_an_error_proposes_works(build):
    assert not any(".mlp." in name for name in names(build("llama"), exclude_modules=r"(.*\.)?mlp\..*"))


def test_all_linear_goes_by_layer_too(build):
    found = names(build("llama"), layers_to_transform=1)
    assert found and all(".layers.1." in name for name in found)
    assert set(found) == set(names(build("llama"), exclude_modules=r".*\.layers\.0\..*"))


def test_names_that_are_endings_of_heads_and_parts_stay_apart():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict({"classifier": nn.Linear(8, 8)})
            self.classifier = nn.Linear(8, 3)

    assert names(Net()) == ["body.classifier"]
    assert names(Net(), target_modules=["classifier"]) == ["body.classifier", "classifier"]


# -- fused experts ----------------------------------------------------------------------------------------------------


FUSED = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"}


def test_all_linear_means_experts_and_routers(mixtral, deepseek):
    assert in_layer(mixtral, 1) == ATTENTION | FUSED
    dense = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    shared = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    latent = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    assert in_layer(deepseek, 0) == latent | dense
    assert in_layer(deepseek, 1) == latent | FUSED | shared


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["w1", "w3"], ["mlp.experts.gate_up_proj"]),
        (["w2"], ["mlp.experts.down_proj"]),
        (["gate_proj", "up_proj", "down_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        (["gate"], ["mlp.gate.weight"]),
        (["experts"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        (["experts.down_proj", "q_proj"], ["mlp.experts.down_proj", "self_attn.q_proj"]),
        (r".*\.(gate|q_proj)", ["mlp.gate.weight", "self_attn.q_proj"]),
    ],
    ids=str,
)
def test_fused_experts_go_by_the_names_of_their_parts_too(mixtral, wanted, found):
    assert in_layer(mixtral, 0, target_modules=wanted) == in_layer(mixtral, 1, target_modules=wanted) == set(found)


@pytest.mark.parametrize("excluded", [["experts", "gate"], ["gate_up_proj", "w2", "gate.weight"], r".*\.mlp\..*"])
def test_fused_experts_are_excluded_by_any_of_their_names(mixtral, excluded):
    assert in_layer(mixtral, 0, exclude_modules=excluded) == ATTENTION


def test_half_of_a_fused_matrix_cannot_be_meant(mixtral):
    with pytest.raises(EvaError, match=r"names 'up_proj' without 'gate_proj', but 'model.layers.0.mlp.experts.gate_up"):
        names(mixtral, target_modules=["up_proj", "q_proj"])


def test_a_router_that_returns_more_than_its_product_is_left_out():
    model = Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES,
            num_local_experts=4,
            num_experts_per_tok=1,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size_mlp=48,
        )
    )
    assert not any(name.endswith("router") for name in names(model))


# -- nn.MultiheadAttention --------------------------------------------------------------------------------------------


def test_all_linear_means_attention_modules_where_they_can_be_adapted():
    encoder = nn.TransformerEncoderLayer(16, 2, 24)
    assert names(encoder) == ["self_attn", "linear1", "linear2"]
    odd = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, kdim=8), "fc": nn.Linear(16, 16)})
    assert names(odd) == ["fc"]
