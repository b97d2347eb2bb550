"""Targets by the rules of PEFT, compared with PEFT itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from evatune import EvaError
from evatune.activations.layers.targets import TargetRules, find_targets, unwrap

KINDS = ["llama", "gpt2", "bert", "t5", "vit"]

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "layers.1.fc",
    "encoder.layers.1.fc",
    "encoder.layer.1.attention.self.query",
    "transformer.h.3.attn.c_attn",
    "transformer.h.3.mlp.experts.2.w1",
    "model.layers.2.block_sparse_moe.experts.5.w1",
    "decoder.block.0.layer.1.EncDecAttention.q",
    "q_proj",
    "my_q_proj",
    "fc",
    "fc1",
    "lm_head",
    "vision_tower.blocks.7.mlp.fc1",
]
RULES = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "fc"]},
    {"target_modules": {"c_attn"}},
    {"target_modules": ["layers.1.fc"]},
    {"target_modules": ["encoder.layers.1.fc"]},
    {"target_modules": ["self_attn.q_proj", "mlp.fc1"]},
    {"target_modules": ["proj"]},
    {"target_modules": r".*q_proj"},
    {"target_modules": r".*\.(q_proj|fc)$"},
    {"target_modules": r"model\.layers\.1.*"},
    {"target_modules": r"q_proj"},
    {"target_modules": r"model\.layers\.1"},
]
LIMITS = [
    {},
    {"exclude_modules": ["q_proj"]},
    {"exclude_modules": ["layers.1.self_attn.q_proj", "lm_head"]},
    {"exclude_modules": r".*layers\.1\..*"},
    {"exclude_modules": "q_proj"},
    {"exclude_modules": []},
]
LAYERS = [
    {},
    {"layers_to_transform": 1},
    {"layers_to_transform": 0},
    {"layers_to_transform": [0, 10]},
    {"layers_to_transform": []},
    {"layers_to_transform": [1, 3], "layers_pattern": "layers"},
    {"layers_to_transform": [1, 3], "layers_pattern": ["h", "layer"]},
    {"layers_to_transform": [2, 5], "layers_pattern": "experts"},
    {"layers_to_transform": [2, 5], "layers_pattern": []},
    {"layers_to_transform": [7], "layers_pattern": "blocks"},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_names_match_as_in_peft(rules):
    for limits, layers in itertools.product(LIMITS, LAYERS):
        if layers and isinstance(rules["target_modules"], str):
            continue  # which PEFT refuses
        settings = rules | limits | layers
        config = LoraConfig(**settings)
        ours = TargetRules(**settings)
        for name in NAMES:
            assert ours.match(name) == bool(check_target_module_exists(config, name)), (settings, name)


def adapted(model, **settings):
    """The modules that PEFT gives an adapter, in the model's order."""
    wrapped = get_peft_model(model, LoraConfig(r=2, **settings)).get_base_model()
    return [name for name, module in wrapped.named_modules() if hasattr(module, "base_layer")]


def ours(model, **settings):
    return [target.name for target in find_targets(model, TargetRules(**settings))]


PER_MODEL = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "output.dense"],
    "t5": ["q", "wi", "EncDecAttention.o"],
    "vit": ["q_proj", "fc1"],
}


def endings(build, kind):
    """Two kinds of linear layer of this model, whatever they are called in the installed release."""
    known = {name.rsplit(".", 1)[-1] for name in ours(build(kind))}
    wanted = [name for name in PER_MODEL[kind] if name.rsplit(".", 1)[-1] in known]
    return wanted or sorted(known)[:2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [{}, {"layers_to_transform": [1]}, {"exclude_modules": r".*\.0\..*"}], ids=str)
def test_the_same_modules_of_a_real_model_as_peft(build, kind, layers):
    settings = {"target_modules": endings(build, kind)} | layers
    assert ours(build(kind), **settings) == adapted(build(kind), **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_is_what_peft_makes_of_it(build, kind):
    task = {"task_type": TaskType.SEQ_CLS} if kind in ("bert", "vit") else {}
    expected = adapted(build(kind), target_modules="all-linear", **task)
    if task:
        expected = [name for name in expected if name != "classifier"]
    assert ours(build(kind)) == expected
    assert not {"lm_head", "classifier", "score"} & set(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_with_exclusions_is_what_peft_makes_of_it(build, kind):
    excluded = {"exclude_modules": endings(build, kind)}
    task = {"task_type": TaskType.SEQ_CLS} if kind in ("bert", "vit") else {}
    assert ours(build(kind), **excluded) == adapted(build(kind), target_modules="all-linear", **excluded, **task)


@pytest.mark.parametrize("kind", KINDS)
def test_wrapped_models_have_the_same_names_and_modules(build, kind):
    bare = find_targets(build(kind), TargetRules())
    some = endings(build, kind)
    model = get_peft_model(build(kind), LoraConfig(r=2, target_modules=some))
    model.add_adapter("second", LoraConfig(r=3, target_modules="all-linear"))
    wrapped = find_targets(model, TargetRules())
    assert [t.name for t in wrapped] == [t.name for t in bare]
    for target, expected in zip(wrapped, bare, strict=True):
        assert type(target.module) is type(expected.module), "the base layer, not the adapter around it"
        assert (target.in_features, target.out_features) == (expected.in_features, expected.out_features)
        assert target.in_features == target.module.weight.shape[0 if kind == "gpt2" else 1]


def test_a_head_that_is_trained_beside_the_adapter_is_no_target(build):
    model = get_peft_model(build("bert"), LoraConfig(r=2, target_modules="all-linear", task_type=TaskType.SEQ_CLS))
    assert ours(model) == ours(build("bert"))


def test_what_is_around_a_model_is_taken_off(build):
    model = build("llama")
    assert unwrap(model) is model
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert unwrap(wrapped) is model
    assert unwrap(torch.compile(wrapped, backend="eager")) is model
    assert unwrap(nn.DataParallel(wrapped)) is model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"target_modules='q_porj' \(did you mean 'q_proj'"),
        ({"target_modules": ["model.layers.0.self_attn.q_porj"]}, r"did you mean 'q_proj'"),
        ({"target_modules": r".*\.q_porj"}, r"\(did you mean 'q_proj'.*its linear layers are q_proj, k_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"'q_proj' with layers_to_transform=\[7\]"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"with exclude_modules=\['q_proj'\]"),
        ({"exclude_modules": r".*"}, r"with exclude_modules='\.\*'"),
    ],
)
def test_no_match_names_what_is_near(build, settings, message):
    with pytest.raises(EvaError, match=message):
        find_targets(build("llama"), TargetRules(**settings))


def test_a_model_without_linear_layers_says_so():
    with pytest.raises(EvaError, match="its linear layers are none"):
        find_targets(nn.Sequential(nn.Conv1d(2, 2, 1)), TargetRules())


def test_what_is_not_linear_is_named(build):
    with pytest.raises(EvaError, match=r"target 'model\.norm' is a LlamaRMSNorm, .* leave it out"):
        find_targets(build("llama"), TargetRules(target_modules=["model.norm", "q_proj"]))
