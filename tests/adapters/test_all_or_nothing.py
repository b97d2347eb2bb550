"""Whatever fails, and wherever it fails: the model is what it was, and a second attempt works."""

from __future__ import annotations

import copy
import sys

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

import evatune
from evatune.adapters import initialize_lora_eva_weights
from evatune.adapters.all_or_nothing import all_or_nothing
from evatune.errors import EvaError

QUIET = {"progress": False}


class InjectedError(RuntimeError):
    """What goes wrong in these tests."""


def everything(model):
    """All that can be seen of a model: modules, attributes, parameters by identity, value and trainability, hooks."""
    seen = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            held = list(value.items()) if isinstance(value, dict) else list(value) if isinstance(value, list) else value
            seen[path, name] = held
        seen[path, "class"] = type(module)
        config = vars(module).get("config")
        if config is not None:
            seen[path, "config"] = copy.deepcopy({k: v for k, v in vars(config).items() if not callable(v)})
    tensors = {
        name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    return seen, tensors


def same(before, after):
    assert before[0].keys() == after[0].keys()
    for key, value in before[0].items():
        here = after[0][key]
        if isinstance(value, list):
            assert len(value) == len(here), key
            pairs = zip(value, here, strict=True)
            assert all(
                a is b or (isinstance(a, tuple) and a[0] == b[0] and a[1] is b[1]) or a == b for a, b in pairs
            ), key
        else:
            assert value is here or value == here, key
    assert before[1].keys() == after[1].keys()
    for name, (tensor, required) in before[1].items():
        here = after[1][name][0]
        assert tensor.is_meta == here.is_meta and (tensor.is_meta or torch.equal(tensor, here)), name
        assert required == after[1][name][1], name


def fails_at(monkeypatch, owner, name, *, call):
    """Let the n-th call of a function raise."""
    original, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise InjectedError(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


def module(name):
    return sys.modules[f"evatune.adapters.{name}"]  # some functions hide the module of their name


STAGES = [
    # where it fails, which call fails, for which methods
    (lambda: (module("prepare"), "find_targets"), 1, ["lora", "eva"]),
    (lambda: (module("prepare"), "copy_weights"), 1, ["pissa"]),
    (lambda: (module("preparation"), "measure"), 1, ["eva", "eva-minor"]),
    (lambda: (module("wrap"), "get_peft_model"), 1, ["lora", "eva", "olora"]),
    (lambda: (LoraModel, "_create_and_replace"), 5, ["lora", "eva", "pissa", "olora", "dora", "eva+dora"]),
    (lambda: (LoraLayer, "pissa_init"), 4, ["pissa"]),
    (lambda: (LoraLayer, "olora_init"), 4, ["olora"]),
    (lambda: (LoraLayer, "corda_init"), 4, ["corda"]),
    (lambda: (LoraLayer, "lora_ga_init"), 4, ["lora-ga"]),
    (lambda: (peft.VeraModel, "_create_and_replace"), 5, ["vera"]),
    (lambda: (peft.BOFTModel, "_create_and_replace"), 5, ["boft"]),
    (lambda: (peft.AdaLoraModel, "_create_and_replace"), 5, ["adalora"]),
    (lambda: (module("initialize"), "write_layer"), 6, ["eva", "eva-rot", "lora-redist", "eva+dora"]),
    (lambda: (module("prepare"), "take_out"), 1, ["pissa", "milora", "olora", "lora-ga", "corda"]),
    (lambda: (module("base_change"), "down_up"), 6, ["pissa", "olora", "milora"]),
    (lambda: (module("prepare"), "remember"), 1, ["lora", "milora"]),
]
CASES = [(where, call, method) for where, call, methods in STAGES for method in methods]


@pytest.mark.parametrize(("where", "call", "method"), CASES, ids=[f"{m}-{i}" for i, (_, _, m) in enumerate(CASES)])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "partly frozen"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_prepare_changes_all_or_nothing(llama, batches, outputs, monkeypatch, where, call, method, frozen):
    base = llama()
    if frozen:
        base.model.embed_tokens.requires_grad_(False)
    base.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    base.note = "the caller's own"
    before = everything(base)
    expected = outputs(base, batches[0])
    options = {"method": method, "rank": 4, "batches": batches, "total_steps": 10}
    options |= QUIET
    with monkeypatch.context() as patch:
        fails_at(patch, *where(), call=call)
        with pytest.raises((InjectedError, EvaError)):
            evatune.prepare(base, **options)
    same(before, everything(base))
    model = evatune.prepare(base, **options).eval()
    torch.testing.assert_close(outputs(model, batches[0]), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("fails", ["in the batches", "in the model", "at Ctrl-C"])
@pytest.mark.parametrize("method", ["eva", "eva-grad", "lora-ga", "lora-one", "corda"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_what_fails_while_data_are_looked_at_changes_nothing(llama, batches, method, fails):
    base = llama()
    before = everything(base)

    def broken():
        yield batches[0]
        if fails == "in the batches":
            raise InjectedError
        if fails == "at Ctrl-C":
            raise KeyboardInterrupt
        yield {"input_ids": torch.full((1, 4), 99_999), "labels": torch.zeros(1, 4, dtype=torch.long)}

    stopped = fails == "at Ctrl-C" and method == "eva"  # which then starts from what was measured
    if stopped:
        evatune.prepare(base, method=method, rank=4, batches=broken(), **QUIET)
        return
    with pytest.raises((InjectedError, EvaError, IndexError, KeyboardInterrupt)):
        evatune.prepare(base, method=method, rank=4, batches=broken(), **QUIET)
    same(before, everything(base))


@pytest.mark.on_hardware("bitsandbytes does not know it")
def test_a_failure_after_quantizing_brings_the_full_weights_back(llama, batches):
    base = llama()
    before = everything(base)
    with pytest.raises(EvaError, match="there was no batch to measure"):
        evatune.prepare(base, method="eva+qlora", rank=4, batches=[], **QUIET)
    same(before, everything(base))


def test_prepare_on_what_peft_refuses_half_way(batches):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(16, 16), nn.Conv2d(4, 4, 3, groups=2)
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x):
            return self.norm(self.first(x))

    base = Net()
    before = everything(base)
    with pytest.raises(EvaError, match="PEFT cannot do 'lora' here"):  # rank 3 does not divide among two groups
        evatune.prepare(base, method="lora", rank=3, target_modules=["first", "second"])
    same(before, everything(base))


@pytest.mark.parametrize("call", [1, 6, 14])
@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"low_cpu_mem_usage": True}, {"bias": "lora_only"}], ids=str
)
def test_initialize_changes_all_or_nothing(llama, batches, outputs, monkeypatch, call, settings):
    settings = dict(settings)
    low = settings.pop("low_cpu_mem_usage", False)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", **settings)
    model = peft.get_peft_model(llama(), config, low_cpu_mem_usage=low).eval()
    spectra = evatune.measure(llama(), batches, rank=4, **QUIET)
    before = everything(model)
    with monkeypatch.context() as patch:
        fails_at(patch, module("initialize"), "write_layer", call=call)
        with pytest.raises(InjectedError):
            evatune.initialize(model, spectra)
    same(before, everything(model))
    assert model.peft_config["default"] is config
    evatune.initialize(model, spectra)
    torch.testing.assert_close(outputs(model, batches[0]), outputs(llama(), batches[0]))


def test_a_saved_start_is_loaded_all_or_nothing(llama, batches, tmp_path, monkeypatch):
    evatune.prepare(llama(), method="pissa", rank=4).save_pretrained(tmp_path)
    base = llama()
    before = everything(base)
    with monkeypatch.context() as patch:
        fails_at(patch, module("base_change"), "down_up", call=3)
        with pytest.raises(InjectedError):
            module("base_change").load_start(base, tmp_path)
    same(before, everything(base))


def test_pefts_own_call_changes_all_or_nothing(llama, lora, monkeypatch):
    model = lora(llama())
    before = everything(model)
    names = [name for name, part in model.named_modules() if isinstance(part, LoraLayer)]
    matrices = {name: torch.zeros(2, model.get_submodule(name).in_features) for name in names}
    with monkeypatch.context() as patch:
        fails_at(patch, module("initialize"), "write_layer", call=3)
        with pytest.raises(InjectedError):
            initialize_lora_eva_weights(model, eva_state_dict=matrices)
    same(before, everything(model))


def test_every_kind_of_change_is_undone():
    def hook(*_):
        return None

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.config = type("Config", (), {})()
    model.config.tied = [1, 2]
    model[2].weight.grad = torch.ones(2, 4)
    handle = model[0].register_forward_hook(hook)
    before = everything(model)

    def change():
        with all_or_nothing(model) as noted:
            handle.remove()
            model[1].register_forward_pre_hook(hook)
            model[0].weight.requires_grad_(False)
            model[0].weight.data = torch.zeros(4, 4)
            noted.let_go({model[2].bias: model[2].bias.detach().clone()})
            with torch.no_grad():
                model[2].bias.add_(1)
            model[2].weight.grad = None
            model.config.tied.append(3)
            model.config.further = True
            torch.nn.utils.parametrizations.weight_norm(model[2])
            del model[1]
            model.extra = nn.Linear(2, 2)
            raise InjectedError

    with pytest.raises(InjectedError):
        change()
    same(before, everything(model))
    assert model[2].weight.grad.sum() == 8
    assert list(model[0]._forward_hooks.values()) == [hook]
    handle.remove()  # the caller's handle is good for its hook again
    assert not model[0]._forward_hooks


def test_what_goes_well_stays():
    model = nn.Sequential(nn.Linear(4, 4))
    with all_or_nothing(model):
        model.extra = nn.Linear(2, 2)
    assert hasattr(model, "extra")
