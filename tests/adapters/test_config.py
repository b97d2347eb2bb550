"""The `LoraConfig` that is written, and what PEFT rebuilds from it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key

import evatune
from evatune.adapters.config import _exclude, configured, planned_config
from evatune.allocation import RankPlan


def layers(model):
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer) and "default" in m.r}


def starve(model, batches, *names):
    """Initialize with spectra in which the modules `names` explain next to nothing."""
    spectra = evatune.measure(model, batches, target_modules=list(layers(model)), n_components=8, progress=False)
    for name in names:
        key = spectra.targets[name].input
        spectra.inputs[key] = replace(spectra.inputs[key], total_variance=1e12)
    plan = evatune.initialize(model, spectra)
    assert all(plan.ranks[name] == 0 for name in names)
    return plan


def assert_reloads(model, base, batch, folder, outputs, *, train=True):
    """Check that PEFT rebuilds the adapter bit for bit on a fresh base model."""
    if train:  # B = 0 would hide a wrong scale
        with torch.no_grad():
            for layer in layers(model).values():
                layer.lora_B["default"].weight.normal_(std=0.1)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    assert list(layers(loaded)) == list(layers(model))
    for name, layer in layers(model).items():
        again = layers(loaded)[name]
        assert again.r == layer.r
        assert again.scaling == layer.scaling
        assert torch.equal(again.lora_A["default"].weight, layer.lora_A["default"].weight)
        assert torch.equal(again.lora_B["default"].weight, layer.lora_B["default"].weight)
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))
    return loaded


@pytest.mark.filterwarnings("error:.*pattern keys")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3}, "alpha_pattern": {"down_proj": 5}},
        {"init_lora_weights": "eva"},
        {"exclude_modules": ["up_proj"]},
        {"exclude_modules": r".*layers\.1\..*proj"},
        {"target_modules": r".*\.(q|v|gate)_proj"},
        {"target_modules": ["down_proj", "o_proj"], "layers_to_transform": [1]},
    ],
    ids=["lora", "rslora", "dora", "patterns", "eva", "excluded", "excluded-regex", "regex", "layers"],
)
def test_saved_adapter_reloads_exactly(llama, lora, batches, outputs, tmp_path, settings):
    model = lora(llama(), **settings)
    evatune.initialize(model, batches, progress=False)
    assert_reloads(model, llama(), batches[0], tmp_path, outputs)


@pytest.mark.parametrize("use_dora", [False, True])
def test_saved_adapter_reloads_exactly_on_conv1d(gpt2, lora, batches, outputs, tmp_path, use_dora):
    model = lora(gpt2(), fan_in_fan_out=True, use_dora=use_dora)
    evatune.initialize(model, batches, progress=False)
    assert_reloads(model, gpt2(), batches[0], tmp_path, outputs)


def test_initial_adapter_reloads_exactly(llama, lora, batches, outputs, tmp_path):
    model = lora(llama())
    evatune.initialize(model, batches, progress=False)
    assert_reloads(model, llama(), batches[0], tmp_path, outputs, train=False)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"exclude_modules": ["up_proj", "layers.1.self_attn.k_proj"]},
        {"exclude_modules": r"(?i).*UP_proj|.*k_proj"},
        {"rank_pattern": {"layers.0.mlp.down_proj": 2}},
    ],
    ids=["plain", "names", "regex", "pattern"],
)
@pytest.mark.filterwarnings("error:.*pattern keys")
def test_rank_zero_reloads_exactly(llama, lora, batches, outputs, tmp_path, settings):
    model = lora(llama(), **settings)
    before = set(layers(model))
    starve(model, batches, "model.layers.0.mlp.down_proj")
    assert set(layers(model)) == before - {"model.layers.0.mlp.down_proj"}
    assert_reloads(model, llama(), batches[0], tmp_path, outputs)


@pytest.mark.filterwarnings("error:.*pattern keys")
def test_rank_pattern_keys_are_anchored(nested, lora, vectors, outputs, tmp_path):
    model = lora(nested(), target_modules=["fc"], r=2)
    plan = evatune.initialize(model, vectors, rho=3.0, progress=False)
    assert plan.ranks["layers.1.fc"] != plan.ranks["encoder.layers.1.fc"], "equal ranks: the test shows nothing"
    assert_reloads(model, nested(), vectors[0], tmp_path, outputs)


def test_rank_zero_is_anchored(nested, lora, vectors, outputs, tmp_path):
    model = lora(nested(), target_modules=["fc"])
    starve(model, vectors, "layers.1.fc")
    assert set(layers(model)) == {"layers.0.fc", "encoder.layers.0.fc", "encoder.layers.1.fc"}
    assert_reloads(model, nested(), vectors[0], tmp_path, outputs)


def test_every_layer_finds_its_own_key(llama, lora, batches):
    model = lora(llama(), rank_pattern={"q_proj": 2, "elsewhere": 9}, alpha_pattern={"v_proj": 3, "elsewhere": 8})
    plan = evatune.initialize(model, batches, progress=False)
    config = model.active_peft_config
    for name, rank in plan.ranks.items():
        assert config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r) == rank
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        assert alpha == plan.alphas[name]
    assert {key.removeprefix("^").replace("\\", "") for key in config.rank_pattern} - {"elsewhere"} == {
        name for name, rank in plan.ranks.items() if rank != config.r
    }
    assert config.rank_pattern["elsewhere"] == 9
    assert config.alpha_pattern["elsewhere"] == 8
    assert set(config.target_modules) == set(lora(llama()).active_peft_config.target_modules)


def test_config_on_disk_is_what_every_loader_accepts(llama, lora, batches, tmp_path):
    model = lora(llama(), init_lora_weights="eva")
    evatune.initialize(model, batches, progress=False)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    assert saved["eva_config"] is None
    assert saved["r"] == 4
    LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("old", "excluded", "kept"),
    [
        (None, ["a.x"], ["b.a.x", "a.xx"]),
        (["q", "b.k"], ["a.x", "q", "m.q", "m.b.k"], ["mq", "mb.k", "k"]),
        ("z|y", ["a.x", "z", "y"], ["zz", "b.a.x"]),
        ("", ["a.x"], ["", "b"]),
    ],
)
def test_exclusions_are_joined(old, excluded, kept):
    regex = _exclude(old, ["a.x"])
    assert all(re.fullmatch(regex, name) for name in excluded)
    assert not any(re.fullmatch(regex, name) for name in kept)


@pytest.mark.parametrize("old", [None, {"q"}, "q.*"])
def test_exclusions_stay_as_they_are_without_rank_zero(old):
    assert _exclude(old, []) == old


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_merging_equals_the_adapter(llama, lora, batches, outputs, settings):
    model = lora(llama(), **settings)
    starve(model, batches, "model.layers.0.mlp.down_proj")
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.1)
    expected = outputs(model, batches[0])
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, batches[0]), expected, rtol=1e-4, atol=1e-4)


def plan_of(**targets):
    """Return a plan from rank and alpha of each target."""
    ranks = {name.replace("__", "."): rank for name, (rank, _) in targets.items()}
    alphas = {name.replace("__", "."): alpha for name, (_, alpha) in targets.items()}
    sizes = dict.fromkeys(ranks, 8)
    return RankPlan(
        ranks=ranks,
        alphas=alphas,
        base_ranks=dict.fromkeys(ranks, 4),
        explained=dict.fromkeys(ranks, 0.5),
        in_features=sizes,
        out_features=sizes,
        rho=2.0,
        metric="ratio",
    )


def test_only_what_differs_is_written_and_what_the_user_wrote_for_these_layers_goes():
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules={"a", "b", "c"},
        rank_pattern={"b": 3, "elsewhere": 9},
        alpha_pattern={r"(b|c)": 5, "elsewhere": 8},
        exclude_modules=["m.c"],
        init_lora_weights="eva",
    )
    planned = planned_config(config, plan_of(m__a=(6, 3.0), m__b=(4, 2), m__c=(4, 2)))
    # The plan gives b and c what r and lora_alpha say; their old keys would say otherwise.
    assert planned.rank_pattern == {r"^m\.a": 6, "elsewhere": 9}
    assert planned.alpha_pattern == {r"^m\.a": 3.0, "elsewhere": 8}
    assert (planned.exclude_modules, planned.target_parameters) == (config.exclude_modules, None)
    assert (planned.init_lora_weights, planned.eva_config) == (True, None)
    assert (config.rank_pattern, config.init_lora_weights) == ({"b": 3, "elsewhere": 9}, "eva")


def test_targets_without_rank_are_excluded_and_parameters_left_unnamed():
    config = LoraConfig(r=4, target_modules=["a", "b"], target_parameters=["up", "down"], rank_pattern={"b": 3})
    plan = plan_of(m__a=(8, 8), m__b=(0, 0.0), m__up=(4, 8), m__down=(0, 0.0))
    planned = planned_config(config, plan, parameters={"m.up": "m.up", "m.down": "m.down"})
    assert planned.exclude_modules == r"m\.b"  # PEFT would look for a module of the parameter's name
    assert planned.target_parameters == ["m.up"]
    assert planned.rank_pattern == {r"^m\.a": 8}
    assert planned_config(config, plan).target_parameters == ["up", "down"]


def test_a_key_means_what_it_means_to_peft():
    pattern = {r"layers\.1": 3, "q_proj": 2}
    assert configured(pattern, "encoder.layers.1.k_proj", default=4) == 4  # a key must end the name
    assert configured(pattern, "encoder.layers.1", default=4) == 3
    assert configured(pattern, "m.q_proj", default=4) == 2
    assert configured({}, "m.q_proj", default=4) == configured(None, "m.q_proj", default=4) == 4


def test_names_are_taken_literally():
    regex = _exclude(["b.k"], ["a.x[0]"])
    assert re.fullmatch(regex, "a.x[0]") and not re.fullmatch(regex, "a.x0")
    assert re.fullmatch(regex, "m.b.k") and not re.fullmatch(regex, "m.b-k")
    assert _exclude({"c", "a", "b"}, ["x"]).index("a") < _exclude({"c", "a", "b"}, ["x"]).index("c")
    assert _exclude({"c", "a", "b"}, ["x"]) == _exclude(["b", "c", "a"], ["x"])  # a set has no order
