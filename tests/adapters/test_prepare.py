"""Every method through `evatune.prepare`: outputs at the start, saving, merging, taking off, bad input."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel

import evatune
from evatune.adapters import freeze_a, initialized_plan, save_adapter, unload
from evatune.adapters.attach import load_adapter
from evatune.adapters.base_change import base_change, load_start
from evatune.adapters.unloading import base_state
from evatune.errors import EvaError
from evatune.methods import METHODS

QUIET = {"progress": False}
ADAPTERS = [name for name in METHODS if name != "full"]
COMBINED = [
    "dora",
    "rslora",
    "lora+",
    "eva+dora",
    "eva+rslora",
    "eva+lora+",
    "pissa+dora",
    "milora+rslora",
    "lora-ga+dora",
]
CHANGES_BASE = [name for name, row in METHODS.items() if row.changes_base] + ["pissa+dora", "milora+rslora"]

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def settings(method: str, batches: object) -> dict[str, object]:
    start = METHODS.get(method.split("+")[0], METHODS["lora"])
    options = {"method": method, "rank": 4, "batches": batches, "total_steps": 10}
    return options | (QUIET if start.needs_spectra else {})


def shake(model: torch.nn.Module) -> None:
    """Stand in for training: move everything trainable."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize("method", ADAPTERS + COMBINED)
def test_start_save_load_merge_and_take_off(llama, batches, outputs, tmp_path, method):
    base = llama()
    weights = copy.deepcopy(base.state_dict())
    expected = outputs(base, batches[0])
    model = evatune.prepare(base, **settings(method, batches)).eval()
    assert isinstance(model, PeftModel)
    at_start = outputs(model, batches[0])
    if method == "lora-one":
        assert not torch.allclose(at_start, expected, atol=1e-3)  # its start is a step
    else:
        torch.testing.assert_close(at_start, expected, atol=2e-5, rtol=1e-5)

    shake(model)
    trained = outputs(model, batches[0])
    assert (trained - at_start).abs().max() > 1e-4
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(loaded, batches[0]), trained, atol=2e-5, rtol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(outputs(merged, batches[0]), trained, atol=1e-4, rtol=1e-4)

    bare = unload(model)
    assert bare.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bare.state_dict().items())


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_what_is_taken_out_of_the_base_has_all_digits_under_autocast(llama, batches, outputs, method):
    base = llama()
    expected = outputs(base, batches[0])
    with torch.autocast(base.device.type, torch.bfloat16):
        model = evatune.prepare(base, **settings(method, batches)).eval()
    torch.testing.assert_close(outputs(model, batches[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", CHANGES_BASE)
def test_what_is_saved_is_plain_lora_of_twice_the_rank_for_the_untouched_base(llama, batches, tmp_path, method):
    model = evatune.prepare(llama(), **settings(method, batches))
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(llama(), tmp_path / "adapter")
    config = loaded.peft_config["default"]
    assert config.r == 8
    assert config.init_lora_weights is True
    layers = [name for name in loaded.state_dict() if name.endswith("lora_A.default.weight")]
    assert len(layers) == 14
    base = llama().state_dict()
    for name, tensor in unload(loaded).state_dict().items():
        assert torch.equal(tensor, base[name])


@pytest.mark.parametrize("method", CHANGES_BASE)
def test_a_start_that_peft_saved_goes_on_bit_for_bit(llama, batches, outputs, tmp_path, method):
    model = evatune.prepare(llama(), **settings(method, batches)).eval()
    model.save_pretrained(tmp_path / "start")
    again = load_start(llama(), tmp_path / "start").eval()
    assert torch.equal(outputs(again, batches[0]), outputs(model, batches[0]))
    shake(model)
    shake(again)
    assert torch.equal(outputs(again, batches[0]), outputs(model, batches[0]))
    save_adapter(again, tmp_path / "adapter")
    loaded = load_adapter(llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(loaded, batches[0]), outputs(model, batches[0]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["milora", "lora-ga"])
def test_peft_alone_refuses_a_start_that_it_would_put_beside_the_wrong_weights(llama, batches, tmp_path, method):
    evatune.prepare(llama(), **settings(method, batches)).save_pretrained(tmp_path / "start")
    with pytest.raises(EvaError, match=f"Unknown initialization init_lora_weights='{method}'"):
        load_adapter(llama(), tmp_path / "start")


def test_an_adapter_that_leaves_the_base_alone_has_no_start_to_load(llama, batches, tmp_path):
    model = evatune.prepare(llama(), **settings("eva", batches))
    assert base_change(model) is None
    model.save_pretrained(tmp_path / "start")
    assert load_start(llama(), tmp_path / "start") is None


def test_base_weights_that_were_not_kept_cannot_come_back(llama, batches):
    model = evatune.prepare(llama(), **settings("pissa", batches), keep_base=False)
    assert base_state(model).weights is None
    with pytest.raises(EvaError, match=r"were not kept \(keep_base=False\); load the base model anew"):
        unload(model)


def test_full_trains_the_model_itself(llama):
    base = llama().requires_grad_(False)
    assert evatune.prepare(base, method="full") is base
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("method", ["lora", "eva", "milora"])
def test_a_frozen_a_leaves_b_to_train(llama, batches, method):
    model = evatune.prepare(llama(), **settings(method, batches), train_a=False)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".lora_B." in name for name in trainable)


@pytest.mark.parametrize("budget", ["components", "parameters"])
def test_a_plan_beside_a_frozen_a_counts_what_is_trained(llama, batches, budget):
    spectra = evatune.measure(llama(), batches, rank=4, **QUIET)
    model = evatune.prepare(llama(), method="eva", rank=4, spectra=spectra, budget=budget, train_a=False)
    plan = initialized_plan(model)
    assert plan == spectra.plan(4, budget=budget, train_a=False)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == plan.n_parameters
    assert plan.uniform_parameters == 4 * sum(plan.out_features.values())
    with_a = spectra.plan(4, budget=budget)
    assert (plan.ranks == with_a.ranks) == (budget == "components")


def test_a_is_frozen_on_every_layer_type_and_on_one_adapter_only(lora, batches):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tokens, self.conv = torch.nn.Embedding(64, 8), torch.nn.Conv1d(8, 16, 3, padding=1)
            self.attn = torch.nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, input_ids):
            x = self.conv(self.tokens(input_ids).transpose(1, 2)).transpose(1, 2)
            return self.attn(x, x, x, need_weights=False)[0]

    tokens = [batch["input_ids"] for batch in batches]
    options = {"target_modules": ["tokens", "conv", "attn"], "rank": 4, "train_a": False}
    model = evatune.prepare(Net(), method="eva", batches=tokens, budget="parameters", progress=False, **options)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == initialized_plan(model).n_parameters <= initialized_plan(model).uniform_parameters
    model.add_adapter("other", LoraConfig(r=2, target_modules=["conv"]))
    model.base_model.set_adapter(["default", "other"])
    freeze_a(model)
    trained = {name.split(".lora_")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"embedding_B.default", "B.default.weight", "A.other.weight", "B.other.weight"}
    freeze_a(model, "other")
    assert not any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(EvaError, match="A of 'tokens' is zero, as PEFT starts it on embeddings"):
        evatune.prepare(Net(), method="lora", **options)


@pytest.mark.parametrize("method", ["lora", "pissa", "lora-ga", "corda", "eva-rot", "vera", "adalora", "boft"])
def test_equal_seed_equal_start_and_the_caller_s_generators_are_left_alone(llama, batches, method):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = evatune.prepare(llama(), **settings(method, batches), seed=3).state_dict()
    torch.manual_seed(5)
    base = llama()
    torch.manual_seed(6)
    expected = torch.get_rng_state()
    second = evatune.prepare(base, **settings(method, batches), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), expected)
    assert not torch.equal(before, expected)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["pissa", "milora", "lora-ga", "corda", "lora-one", "eva-grad", "eva-minor", "dora"])
def test_gpt2_whose_weights_are_transposed(gpt2, batches, outputs, tmp_path, method):
    base = gpt2()
    weights = copy.deepcopy(base.state_dict())
    expected = outputs(base, batches[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT corrects its own settings: nothing for users to read
        model = evatune.prepare(base, **settings(method, batches)).eval()
    if method != "lora-one":
        torch.testing.assert_close(outputs(model, batches[0]), expected, atol=2e-5, rtol=1e-5)
    shake(model)
    trained = outputs(model, batches[0])
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(gpt2(), tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(loaded, batches[0]), trained, atol=2e-5, rtol=1e-5)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unload(model).state_dict().items())


def test_spectra_do_instead_of_batches(llama, batches, outputs):
    spectra = evatune.measure(llama(), batches, rank=4, **QUIET)
    by_batches = evatune.prepare(llama(), **settings("eva", batches))
    for given in ({"batches": spectra}, {"spectra": spectra}):
        model = evatune.prepare(llama(), method="eva", rank=4, **given)
        assert initialized_plan(model).ranks == initialized_plan(by_batches).ranks
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, by_batches.state_dict()[name])


def test_the_plan_follows_rho_metric_and_budget(llama, batches):
    spectra = evatune.measure(llama(), batches, rank=4, rho=3, **QUIET)
    options = {"rank": 4, "rho": 3.0, "metric": "sum", "budget": "parameters"}
    model = evatune.prepare(llama(), method="eva", spectra=spectra, lora_alpha=2.0, **options)
    assert initialized_plan(model) == spectra.plan(lora_alpha=2.0, **options)
    assert initialized_plan(model).n_parameters <= initialized_plan(model).uniform_parameters


BAD = [
    ({"method": "eva"}, "'eva' looks at data before training: pass batches or spectra"),
    ({"method": "lora-ga"}, r"'lora-ga' looks at data before training: pass batches \(batches=loader\)"),
    ({"method": "lora", "rank": 0}, "rank is 0, but must be at least 1"),
    ({"method": "lora", "max_batches": 3}, "max_batches cannot be given: method 'lora' measures nothing"),
    ({"method": "lora", "max_batchs": 3}, r"evatune.prepare has no option 'max_batchs' \(did you mean 'max_batches'"),
    ({"method": "adalora"}, "needs the number of optimizer steps, at least 4: total_steps=None"),
    ({"method": "vera", "train_a": False}, r"'vera' has no A to freeze; leave out train_a=False \(--no-train-a\)"),
    ({"method": "full", "train_a": False}, "'full' has no A to freeze"),
    ({"method": "lora+", "train_a": False}, "with a frozen A .* it does nothing"),
    ({"method": "pissa", "rank": 17}, "rank 17 is too large for method 'pissa' on 'model.layers.0.self_attn.k_proj'"),
    ({"method": "lora-ga", "rank": 9, "batches": []}, "it takes 18 singular vectors of 16"),
    ({"method": "lora-ga", "rank": 4, "batches": []}, "there was no batch to look at"),
    ({"method": "lora-one", "rank": 4, "batches": []}, "there was no batch to look at"),
    ({"method": "corda", "rank": 4, "batches": []}, "there was no batch to look at"),
    ({"method": "lora", "target_modules": "q_projj"}, "no module of the model matches"),
    ({"method": "boft", "block_size": 7}, "PEFT cannot do 'boft' here"),
    (
        {"method": "eva-raw", "metric": "sum", "batches": []},
        "compares components by metric 'raw'; leave out metric='sum'",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_refused_and_nothing_changes(llama, options, message):
    base = llama()
    modules = [type(module) for module in base.modules()]
    weights = copy.deepcopy(base.state_dict())
    with pytest.raises(EvaError, match=message):
        evatune.prepare(base, **options)
    assert [type(module) for module in base.modules()] == modules
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in base.modules())


@pytest.mark.parametrize("method", ["lora-ga", "lora-one", "eva-grad"])
def test_batches_without_labels_are_named(llama, batches, method):
    unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    unlabelled = [batches[0], *unlabelled]  # what the first batch left behind must go too
    base = llama()
    with pytest.raises(
        EvaError, match="the model returned no loss for a batch: put `labels` into the batches or pass loss="
    ):
        evatune.prepare(base, **settings(method, unlabelled))
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any(hasattr(module, "_peft_loraga_grad") for module in base.modules())


def test_a_loss_of_your_own(llama, batches):
    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(input_ids=batch["input_ids"]).logits.square().mean()

    unlabelled = [{"input_ids": batch["input_ids"]} for batch in batches]
    for method in ("lora-ga", "lora-one", "eva-grad"):
        evatune.prepare(llama(), **settings(method, unlabelled), loss=loss)


def test_a_shared_weight_is_not_changed_behind_its_other_owner(llama, batches):
    base = llama()
    base.lm_head.weight = base.model.embed_tokens.weight
    with pytest.raises(EvaError, match=r"'lm_head' shares its weight with 'model\.embed_tokens'"):
        evatune.prepare(base, method="pissa", rank=4, target_modules=["lm_head"])


def test_olora_says_that_it_cannot_do_gpt2(gpt2):
    with pytest.raises(EvaError, match="is a Conv1D, which it cannot adapt"):
        evatune.prepare(gpt2(), method="olora", rank=4)


def test_a_model_that_has_an_adapter_is_refused(llama, lora):
    with pytest.raises(EvaError, match="has an adapter already"):
        evatune.prepare(lora(llama()), method="lora")


def test_qlora_without_bitsandbytes_is_refused(llama, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(EvaError, match="qlora needs the package bitsandbytes, which is not installed"):
        evatune.prepare(llama(), method="qlora")


def test_corda_takes_examples_one_by_one_and_without_padding(batches):
    from evatune.adapters.corda import examples as split

    mask = torch.ones(4, 16, dtype=torch.long)
    mask[1, 10:] = 0
    mask[2, :5] = 0
    examples = list(split(batches[0] | {"attention_mask": mask}))
    assert [example["input_ids"].shape for example in examples] == [(1, 16), (1, 10), (1, 11), (1, 16)]
    assert torch.equal(examples[2]["input_ids"][0], batches[0]["input_ids"][2, 5:])
    images = torch.randn(3, 2, 8, 8)
    assert [example["pixel_values"].shape for example in split({"pixel_values": images})] == [(1, 2, 8, 8)] * 3
    assert [image.shape for image in split((images, torch.zeros(3)))] == [(1, 2, 8, 8)] * 3
    vectors = torch.randn(5, 7)
    assert [example.shape for example in split(vectors)] == [(5, 7)]


def test_boft_is_silent_about_what_it_cannot_have(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evatune.prepare(llama(), method="boft")


@pytest.mark.parametrize("method", ["milora", "lora-ga", "eva-grad"])
def test_methods_of_matrices_refuse_other_layers(batches, method):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 4))
    with pytest.raises(EvaError, match=f"method '{method}' works on linear layers, and '0' is a Conv2d"):
        evatune.prepare(model, method=method, rank=2, batches=batches, target_modules=["0", "2"])


@pytest.mark.on_hardware("bitsandbytes does not know it")
@pytest.mark.parametrize("method", ["qlora", "eva+qlora"])
def test_qlora_starts_as_the_base_in_four_bits(llama, batches, outputs, tmp_path, method):
    import bitsandbytes as bnb

    from evatune.adapters.four_bits import quantize_targets

    quantized = llama()
    quantize_targets(quantized, target_modules="all-linear")
    expected = outputs(quantized, batches[0])
    assert (expected - outputs(llama(), batches[0])).abs().max() > 1e-3
    model = evatune.prepare(llama(), **settings(method, batches)).eval()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert isinstance(layer.base_layer, bnb.nn.Linear4bit)
    assert not layer.base_layer.weight.requires_grad
    torch.testing.assert_close(outputs(model, batches[0]), expected)
    loss = model(**batches[0]).loss
    loss.backward()
    assert layer.lora_B["default"].weight.grad.any()  # also after an evaluation
    shake(model)
    trained = outputs(model, batches[0])
    save_adapter(model, tmp_path / "trained")
    again = llama()
    quantize_targets(again, target_modules="all-linear")
    loaded = load_adapter(again, tmp_path / "trained").eval()
    torch.testing.assert_close(outputs(loaded, batches[0]), trained)


def test_targets_with_a_shared_input_are_rotated_each_in_its_own_way(llama, batches):
    model = evatune.prepare(llama(), **settings("eva-rot", batches), rho=1.0)
    attention = model.get_base_model().model.layers[0].self_attn
    q, k = (module.lora_A["default"].weight for module in (attention.q_proj, attention.k_proj))
    torch.testing.assert_close(q.T @ q, k.T @ k)
    assert not torch.allclose(q, k, atol=1e-2)
