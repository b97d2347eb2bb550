"""What `initialize` writes into one adapter."""

from __future__ import annotations

import functools
import math
import sys
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import evatune
from evatune.adapters import freeze_a, initialized_plan
from evatune.errors import EvaError, EvaWarning


def layers(model, adapter_name="default"):
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


@pytest.fixture
def starved(llama, lora, batches):
    """Spectra of a tiny Llama in which the first layer's down_proj explains next to nothing, so it gets rank 0."""
    model = lora(llama())
    spectra = evatune.measure(model, batches, target_modules=list(layers(model)), n_components=8, progress=False)
    name = "model.layers.0.mlp.down_proj"
    key = spectra.targets[name].input
    spectra.inputs[key] = replace(spectra.inputs[key], total_variance=1e12)
    return name, spectra


def test_down_starts_from_leading_components_and_up_from_zero(llama, lora, batches):
    model = lora(llama())
    spectra = evatune.measure(model, batches, target_modules=list(layers(model)), n_components=8, progress=False)
    plan = evatune.initialize(model, spectra)
    assert plan.total == plan.budget == 4 * 14
    assert len(set(plan.ranks.values())) > 1, "the tiny model gives every layer the same rank: the test shows nothing"
    for name, layer in layers(model).items():
        rank = plan.ranks[name]
        assert layer.r["default"] == rank
        assert torch.equal(layer.lora_A["default"].weight, spectra[name].components[:rank])
        assert layer.lora_A["default"].out_features == layer.lora_B["default"].in_features == rank
        assert not layer.lora_B["default"].weight.any()
        assert layer.lora_B["default"].weight.shape[1] == rank


def test_batches_and_spectra_give_the_same_adapter(llama, lora, batches):
    first, second = lora(llama()), lora(llama())
    plan = evatune.initialize(first, iter(batches), progress=False)
    spectra = evatune.measure(second, batches, target_modules=list(layers(second)), n_components=8, progress=False)
    assert evatune.initialize(second, spectra).ranks == plan.ranks
    for name, layer in layers(first).items():
        torch.testing.assert_close(layer.lora_A["default"].weight, layers(second)[name].lora_A["default"].weight)


def test_only_the_adapters_own_layers_are_measured(nested, lora, vectors):
    # By the rules of PEFT the name `layers.1.fc` would also mean `encoder.layers.1.fc`.
    model = lora(nested(), target_modules=r"layers\.\d\.fc")
    assert list(evatune.initialize(model, vectors, progress=False).ranks) == ["layers.0.fc", "layers.1.fc"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.3}, {"lora_bias": True, "lora_alpha": 7}],
    ids=["lora", "rslora", "dora", "dropout", "lora_bias"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outputs_equal_the_base_model(family, settings, request, lora, batches, outputs):
    base = request.getfixturevalue(family)()
    if family == "gpt2":
        settings = settings | {"fan_in_fan_out": True}
    expected = outputs(base, batches[0])
    model = lora(base, **settings)
    evatune.initialize(model, batches, progress=False)
    torch.testing.assert_close(outputs(model, batches[0]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rslora_keeps_the_scale(llama, lora, batches, use_rslora):
    model = lora(llama(), use_rslora=use_rslora, rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 6})
    before = {name: layer.scaling["default"] for name, layer in layers(model).items()}
    plan = evatune.initialize(model, batches, progress=False)
    assert plan.ranks != plan.base_ranks
    for name, layer in layers(model).items():
        assert layer.scaling["default"] == pytest.approx(before[name])
        rank = layer.r["default"]
        assert layer.scaling["default"] == layer.lora_alpha["default"] / (math.sqrt(rank) if use_rslora else rank)


def test_dora_magnitude_is_the_row_norm_of_the_base_weight(llama, lora, batches):
    # In bfloat16 the norms that PEFT takes are rounded, and with them the outputs.
    model = lora(llama(dtype=torch.bfloat16), use_dora=True)
    evatune.initialize(model, batches, progress=False)
    for layer in layers(model).values():
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert magnitude.dtype == torch.float32
        assert magnitude.requires_grad
        torch.testing.assert_close(magnitude, layer.get_base_layer().weight.float().norm(dim=1))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_dtype_dropout_and_trainability_stay(llama, batches, autocast_adapter_dtype):
    config = LoraConfig(r=4, lora_dropout=0.25, target_modules="all-linear")
    model = get_peft_model(llama(dtype=torch.bfloat16), config, autocast_adapter_dtype=autocast_adapter_dtype)
    model.train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    evatune.initialize(model, batches, progress=False)
    assert model.training
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert model.active_adapters == ["default"]
    for layer in layers(model).values():
        assert layer.training
        assert layer.lora_dropout["default"].p == 0.25
        for matrix in (layer.lora_A["default"], layer.lora_B["default"]):
            assert matrix.weight.dtype == (torch.float32 if autocast_adapter_dtype else torch.bfloat16)


def test_a_frozen_adapter_stays_frozen(llama, lora, batches):
    model = lora(llama())
    model.requires_grad_(False)
    evatune.initialize(model, batches, progress=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_optimizer_made_before_trains_what_is_there_after(llama, lora, batches):
    model = lora(llama())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    evatune.initialize(model, batches, progress=False)
    model(**batches[0]).loss.backward()
    optimizer.step()
    assert all(layer.lora_B["default"].weight.any() for layer in layers(model).values())


@pytest.mark.parametrize("trainable", [True, False])
def test_meta_adapters_get_memory(llama, batches, outputs, trainable):
    base = llama()
    expected = outputs(base, batches[0])
    config = LoraConfig(r=4, target_modules="all-linear", lora_bias=True)
    model = get_peft_model(base, config, low_cpu_mem_usage=True).eval()
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.requires_grad_(trainable)
            assert parameter.is_meta
    evatune.initialize(model, batches, progress=False)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert all(p.requires_grad == trainable for name, p in model.named_parameters() if "lora" in name)
    torch.testing.assert_close(outputs(model, batches[0]), expected)


def test_a_compiled_model_is_accepted(nested, lora, vectors):
    model = lora(nested(), target_modules=["fc"])
    compiled = torch.compile(model, backend="eager")
    compiled(vectors[0])
    plan = evatune.initialize(compiled, vectors, progress=False)
    assert initialized_plan(model) is plan
    torch.testing.assert_close(compiled(vectors[0]), model(vectors[0]))


def test_ranks_never_exceed_in_features(nested, lora, vectors):
    model = lora(nested(), r=12, target_modules=["fc"])
    plan = evatune.initialize(model, vectors, rho=3.0, progress=False)
    assert max(plan.ranks.values()) <= 16
    assert all(torch.isfinite(layer.lora_A["default"].weight).all() for layer in layers(model).values())


def test_a_budget_in_parameters(llama, lora, batches):
    spectra = evatune.measure(llama(), batches, n_components=8, progress=False)
    model = lora(llama())
    plan = evatune.initialize(model, spectra, budget="parameters")
    assert plan == spectra.plan(4, lora_alpha=2.0, budget="parameters")
    assert plan.ranks != spectra.plan(4).ranks
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == plan.n_parameters <= plan.uniform_parameters


def test_a_budget_in_parameters_beside_a_frozen_a(llama, lora, batches):
    spectra = evatune.measure(llama(), batches, n_components=8, progress=False)
    model = lora(llama())
    freeze_a(model)
    plan = evatune.initialize(model, spectra, budget="parameters")
    assert plan == spectra.plan(4, lora_alpha=2.0, budget="parameters", train_a=False)
    assert plan.ranks != spectra.plan(4, budget="parameters").ranks
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == plan.n_parameters <= plan.uniform_parameters


def test_a_is_not_held_to_be_frozen_in_an_adapter_that_is_not_active(llama, lora, batches):
    spectra = evatune.measure(llama(), batches, n_components=8, progress=False)
    model = lora(llama())
    model.add_adapter("second", model.peft_config["default"])
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".second." in name)
    assert evatune.initialize(model, spectra, adapter_name="second").train_a


def test_the_ranks_of_each_layer_say_when_measuring_may_stop(llama, lora, batches, monkeypatch):
    given = []

    @functools.wraps(evatune.measure)
    def spy(model, batches, **options):
        given.append(options)
        return evatune.measure(model, batches, **options)

    monkeypatch.setattr(sys.modules["evatune.adapters.initialize"], "measure", spy)
    evatune.initialize(lora(llama()), batches, progress=False)
    mixed = lora(llama(), rank_pattern={"q_proj": 3})
    plan = evatune.initialize(mixed, batches, progress=False)
    assert given[0]["settings"].rank == 4 and given[0]["settings"].n_components is None
    assert given[1]["settings"].rank == plan.base_ranks
    assert set(plan.base_ranks.values()) == {3, 4}
    wider = evatune.initialize(lora(llama(), rank_pattern={"q_proj": 3}), batches, n_components=20, progress=False)
    assert wider.base_ranks == plan.base_ranks


def test_rho_one_keeps_every_rank(llama, lora, batches):
    model = lora(llama(), rank_pattern={"q_proj": 3})
    plan = evatune.initialize(model, batches, rho=1.0, progress=False)
    assert plan.ranks == plan.base_ranks
    assert {name: layer.r["default"] for name, layer in layers(model).items()} == plan.base_ranks
    assert plan.base_ranks["model.layers.1.self_attn.q_proj"] == 3


def test_whitening_does_not_compound_over_shared_inputs(llama, lora, batches):
    model = lora(llama())
    spectra = evatune.measure(model, batches, target_modules=list(layers(model)), n_components=8, progress=False)
    plan = evatune.initialize(model, spectra, whiten=True)
    for name, layer in layers(model).items():
        expected = spectra[name].singular_values[: plan.ranks[name]].rsqrt()
        torch.testing.assert_close(layer.lora_A["default"].weight.norm(dim=1), expected)


def test_targets_with_a_shared_input_share_no_memory(llama, lora, batches):
    model = lora(llama())
    evatune.initialize(model, batches, rho=1.0, progress=False)
    pointers = [layer.lora_A["default"].weight.untyped_storage().data_ptr() for layer in layers(model).values()]
    assert len(set(pointers)) == len(pointers)


def test_spectra_given_are_not_consumed(llama, lora, batches):
    model = lora(llama())
    spectra = evatune.measure(model, batches, target_modules=list(layers(model)), n_components=8, progress=False)
    before = {name: spectra[name].components.clone() for name in spectra}
    evatune.initialize(model, spectra, whiten=True)
    for layer in layers(model).values():
        layer.lora_A["default"].weight.data.zero_()
    assert list(spectra) == list(before)
    assert all(torch.equal(spectra[name].components, before[name]) for name in before)


def test_the_callers_config_is_not_touched(llama, batches):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="eva")
    model = get_peft_model(llama(), config)
    evatune.initialize(model, batches, progress=False)
    assert (config.rank_pattern, config.alpha_pattern, config.init_lora_weights) == ({}, {}, "eva")
    assert model.active_peft_config.rank_pattern
    assert model.active_peft_config.init_lora_weights is True


def test_rank_zero_takes_the_adapter_off_that_layer(llama, lora, batches, outputs, starved):
    name, spectra = starved
    base = llama()
    expected = outputs(base, batches[0])
    model = lora(base)
    plan = evatune.initialize(model, spectra)
    assert plan.ranks[name] == 0
    assert name not in layers(model)
    assert len(layers(model)) == 13
    assert type(base.get_submodule(name)) is nn.Linear
    torch.testing.assert_close(outputs(model, batches[0]), expected)


@pytest.mark.parametrize("active", ["other", "default"])
def test_rank_zero_keeps_other_adapters(llama, lora, batches, outputs, starved, active):
    name, spectra = starved
    model = lora(llama())
    model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("other")
    with_other = outputs(model, batches[0])
    model.set_adapter(active)
    expected = outputs(model, batches[0])
    state = {key: value.clone() for key, value in model.state_dict().items() if ".other." in key}
    trainable = {key: p.requires_grad for key, p in model.named_parameters() if ".default." not in key}
    plan = evatune.initialize(model, spectra)
    assert plan.ranks[name] == 0
    assert name in layers(model, "other")
    assert name not in layers(model)
    after = model.state_dict()
    assert state
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert {key: p.requires_grad for key, p in model.named_parameters() if ".default." not in key} == trainable
    assert model.active_adapters == [active]
    assert torch.equal(outputs(model, batches[0]), expected)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(outputs(model, batches[0]), with_other)


def test_another_trained_adapter_does_not_change_what_is_measured(llama, lora, batches):
    alone, model = lora(llama()), lora(llama())
    model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("other")
    trainable = {key: p.requires_grad for key, p in model.named_parameters()}
    options = {"target_modules": list(layers(alone)), "n_components": 8, "progress": False}
    expected, measured = evatune.measure(alone, batches, **options), evatune.measure(model, batches, **options)
    assert list(measured) == list(expected)
    for name in expected:
        assert torch.equal(measured[name].components, expected[name].components)
        assert torch.equal(measured[name].singular_values, expected[name].singular_values)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == trainable
    assert model.active_adapters == ["other"]


def test_first_gradient_is_larger_than_from_random_rows(llama, lora, batches):
    def gradient(model):
        model(**batches[0]).loss.backward()
        return sum(layer.lora_B["default"].weight.grad.square().sum() for layer in layers(model).values()).sqrt()

    model = lora(llama())
    random = []
    for seed in range(5):
        torch.manual_seed(seed)
        other = lora(llama(seed=0))
        for layer in layers(other).values():  # rows of length one, as EVA's
            weight = layer.lora_A["default"].weight
            weight.data = nn.functional.normalize(torch.randn(weight.shape), dim=1)
        random.append(gradient(other))
    evatune.initialize(model, batches, rho=1.0, progress=False)
    assert gradient(model) > 1.2 * sum(random) / len(random)


def test_initialization_is_deterministic(llama, lora, batches):
    models = [lora(llama()) for _ in range(2)]
    plans = [evatune.initialize(model, batches, progress=False) for model in models]
    assert plans[0] == plans[1]
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_spectra_of_more_targets_start_the_layers_that_there_are(llama, lora, batches):
    spectra = evatune.measure(llama(), batches, n_components=8, progress=False)
    model, alone = (lora(llama(), target_modules=["q_proj"]) for _ in range(2))
    plan = evatune.initialize(model, spectra)
    only_q = evatune.measure(llama(), batches, n_components=8, target_modules=["q_proj"], progress=False)
    assert plan == evatune.initialize(alone, only_q)
    assert list(plan.ranks) == [name for name in spectra if name.endswith("q_proj")]
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.lora_A["default"].weight, layers(alone)[name].lora_A["default"].weight)


class TestErrors:
    """Each is one sentence, and nothing has changed."""

    @pytest.fixture
    def unchanged(self, llama, lora):
        model = lora(llama())
        before = {key: value.clone() for key, value in model.state_dict().items()}
        yield model
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert not model.active_peft_config.rank_pattern
        assert initialized_plan(model) is None

    def test_not_a_peft_model(self, llama, batches):
        with pytest.raises(EvaError, match=r"a PeftModel is needed, got LlamaForCausalLM; call peft.get_peft_model"):
            evatune.initialize(llama(), batches)

    def test_unknown_adapter(self, unchanged, batches):
        with pytest.raises(EvaError, match=r"no adapter 'defaut' \(did you mean 'default'\?\); its adapters are"):
            evatune.initialize(unchanged, batches, adapter_name="defaut")

    def test_adapter_of_another_type(self, llama, batches):
        from peft import AdaLoraConfig

        model = get_peft_model(llama(), AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10))
        with pytest.raises(EvaError, match="adapter 'default' is of type ADALORA; evatune works on LoRA"):
            evatune.initialize(model, batches)

    def test_grouped_convolution(self, lora):
        model = lora(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), target_modules=["0"])
        with pytest.raises(EvaError, match=r"'0' is a convolution with groups=2, .*exclude_modules"):
            evatune.initialize(model, [torch.randn(2, 4, 8, 8)])

    def test_merged_adapter(self, llama, lora, batches):
        model = lora(llama())
        model.merge_adapter()
        with pytest.raises(EvaError, match=r"adapter 'default' is merged into .*unmerge_adapter\(\)"):
            evatune.initialize(model, batches)

    @pytest.mark.parametrize("init", [False, "pissa"])
    def test_adapter_that_does_not_start_from_zero(self, llama, lora, batches, init):
        model = lora(llama(), init_lora_weights=init)
        with pytest.raises(EvaError, match=r"B of adapter 'default' is not zero in 14 of 14 layers .*before training"):
            evatune.initialize(model, batches)

    def test_adapter_that_was_trained(self, llama, lora, batches):
        model = lora(llama())
        list(layers(model).values())[3].lora_B["default"].weight.data[0, 0] = 1e-9
        with pytest.raises(EvaError, match=r"not zero in 1 of 14 layers .*first: 'model.layers.0.self_attn.o_proj'"):
            evatune.initialize(model, batches)

    def test_second_initialization(self, llama, lora, batches):
        model = lora(llama())
        evatune.initialize(model, batches, progress=False)
        with pytest.raises(EvaError, match="adapter 'default' was initialized before; make it anew"):
            evatune.initialize(model, batches)

    def test_an_unknown_budget_is_found_before_measuring(self, unchanged):
        def never():
            raise AssertionError("measured before the budget was checked")
            yield

        with pytest.raises(EvaError, match="budget is 'bytes', but must be one of components, parameters"):
            evatune.initialize(unchanged, never(), budget="bytes")

    def test_rho_below_one_is_found_before_measuring(self, unchanged):
        def never():
            raise AssertionError("measured before rho was checked")
            yield

        with pytest.raises(EvaError, match="rho"):
            evatune.initialize(unchanged, never(), rho=0.5)

    def test_unknown_metric_is_found_before_measuring(self, unchanged):
        def never():
            raise AssertionError("measured before the metric was checked")
            yield

        with pytest.raises(EvaError, match="metric"):
            evatune.initialize(unchanged, never(), metric="ration")

    def test_spectra_of_another_model(self, unchanged, llama, lora, batches):
        other = lora(llama())
        targets = [name for name in layers(other) if not name.endswith(("q_proj", "up_proj"))]
        spectra = evatune.measure(other, batches, target_modules=targets, n_components=8, progress=False)
        with pytest.raises(EvaError, match=r"4 of its layers not in the spectra: model.layers.0.self_attn.q_proj,.*"):
            evatune.initialize(unchanged, spectra)

    def test_spectra_of_other_sizes(self, lora):
        def single(width):
            return lora(nn.Sequential(OrderedDict(fc=nn.Linear(width, 8))), target_modules=["fc"])

        rows = [torch.randn(32, 8)]
        spectra = evatune.measure(single(8), rows, target_modules=["fc"], n_components=6, progress=False)
        with pytest.raises(EvaError, match=r"1 of other sizes: fc \(8 features there, 6 here\)"):
            evatune.initialize(single(6), spectra)

    def test_measuring_options_with_spectra(self, unchanged, llama, lora, batches):
        other = lora(llama())
        spectra = evatune.measure(other, batches, target_modules=list(layers(other)), n_components=8, progress=False)
        with pytest.raises(EvaError, match="max_batches, tau: these options are for measuring, but spectra were given"):
            evatune.initialize(unchanged, spectra, tau=0.9, max_batches=3)

    def test_measuring_options_that_the_adapter_decides(self, unchanged, batches):
        with pytest.raises(EvaError, match="target_modules, rank cannot be given here: the adapter's LoraConfig says"):
            evatune.initialize(unchanged, batches, target_modules=["q_proj"], rank=3)

    def test_a_row_mask_with_spectra(self, unchanged, llama, lora, batches):
        other = lora(llama())
        spectra = evatune.measure(other, batches, target_modules=list(layers(other)), n_components=8, progress=False)
        with pytest.raises(EvaError, match="row_mask: these options are for measuring, but spectra were given"):
            evatune.initialize(unchanged, spectra, row_mask=lambda batch: None)

    def test_unknown_measuring_option(self, unchanged, batches):
        with pytest.raises(EvaError, match=r"no option 'max_batch' \(did you mean 'max_batches'"):
            evatune.initialize(unchanged, batches, max_batch=3)

    def test_eva_config_that_says_something_else_is_named(self, llama, lora, batches):
        from peft import EvaConfig

        model = lora(llama(), init_lora_weights="eva", eva_config=EvaConfig(rho=1.5))
        with pytest.warns(EvaWarning, match="eva_config says rho=1.5, .* called with rho=2.0"):
            evatune.initialize(model, batches, progress=False)


def test_an_adapter_of_a_sharded_model_is_refused_before_anything_is_measured(llama, lora, monkeypatch):
    module = sys.modules["evatune.adapters.fresh"]
    monkeypatch.setattr(module, "sharding_of", lambda model: "fully_shard")
    with pytest.raises(EvaError, match=r"spread over processes by fully_shard.* from the spectra before sharding"):
        evatune.initialize(lora(llama()), iter(()))
