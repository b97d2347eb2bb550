from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

import evatune
from evatune.adapters import export_portable
from evatune.errors import EvaError


@pytest.fixture
def trained(llama, lora, batches):
    """A trained adapter of mixed ranks, with one layer left out."""

    def build(adapter_name="default", **settings):
        model = lora(llama(), adapter_name=adapter_name, **settings)
        targets = [n for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)]
        spectra = evatune.measure(model, batches, target_modules=targets, n_components=8, progress=False)
        key = spectra.targets["model.layers.0.mlp.down_proj"].input
        spectra.inputs[key] = replace(spectra.inputs[key], total_variance=1e12)
        evatune.initialize(model, spectra, adapter_name=adapter_name)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return model

    return build


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"adapter_name": "mine"}],
    ids=["lora", "rslora", "dora", "lora_bias", "named"],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_export_equals_the_adapter(trained, llama, batches, outputs, tmp_path, settings):
    model = trained(**settings)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folder = export_portable(model, tmp_path / "out", adapter_name=settings.get("adapter_name", "default"))
    loaded = PeftModel.from_pretrained(llama(), folder).eval()
    torch.testing.assert_close(outputs(loaded, batches[0]), outputs(model, batches[0]), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_export_has_one_rank_and_scale_one(trained, tmp_path):
    model = trained(use_rslora=True, rank_pattern={"q_proj": 2})
    folder = export_portable(model, tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    rank = max(m.r["default"] for m in model.modules() if isinstance(m, LoraLayer))
    assert config["r"] == config["lora_alpha"] == rank > 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert config["init_lora_weights"] is True
    assert {len(tensor) for key, tensor in tensors.items() if "lora_A" in key} == {rank}
    assert {tensor.shape[1] for key, tensor in tensors.items() if "lora_B" in key} == {rank}
    assert not any("layers.0.mlp.down_proj" in key for key in tensors)


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_only_one_adapter_is_exported(trained, tmp_path, adapter_name):
    model = trained()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    folder = export_portable(model, tmp_path / "out", adapter_name=adapter_name)
    assert not [path for path in folder.iterdir() if path.is_dir()]
    only_q = all("q_proj" in key for key in load_file(folder / "adapter_model.safetensors"))
    assert only_q == (adapter_name == "other")


def test_other_initializations_become_ones_that_every_loader_accepts(llama, lora, tmp_path):
    folder = export_portable(lora(llama(), init_lora_weights="gaussian"), tmp_path / "out")
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_an_initialization_that_changed_the_base_weights_is_refused(llama, lora, tmp_path):
    with pytest.raises(EvaError, match="initialized by 'pissa', which changed the base weights"):
        export_portable(lora(llama(), init_lora_weights="pissa"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_unless_told(trained, tmp_path):
    model = trained()
    (tmp_path / "out").mkdir()
    with pytest.raises(EvaError, match="exists already"):
        export_portable(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    export_portable(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "adapter_config.json").exists()


# -- every layer type -------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Tokens, a convolution over time, attention and linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.conv = nn.Embedding(40, 8), nn.Conv1d(8, 16, 3, padding=1)
        self.attn, self.fc = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 16)

    def forward(self, input_ids):
        x = self.conv(self.tokens(input_ids).transpose(1, 2)).transpose(1, 2)
        return x + self.fc(x + self.attn(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Three experts in one parameter for each layer, stored in either order; every row goes through all."""

    def __init__(self, *, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 8, 12) if is_transposed else torch.randn(3, 12, 8))
        self.down = nn.Parameter(torch.randn(3, 12, 8) if is_transposed else torch.randn(3, 8, 12))

    def forward(self, x):
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return (torch.tanh(x @ up) @ down).sum(0)


class Mixture(nn.Module):
    def __init__(self, *, is_transposed):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.experts = nn.Linear(8, 8), Experts(is_transposed=is_transposed)

    def forward(self, input_ids):
        return self.experts(self.fc(torch.nn.functional.one_hot(input_ids.flatten() % 8, 8).float()))


EVERY = {"target_modules": ["tokens", "conv", "attn", "fc"]}
FUSED = {"target_modules": ["fc"], "target_parameters": ["experts.up", "experts.down"]}
KINDS = {
    "all": (Layers, EVERY),
    "all, rsLoRA": (Layers, EVERY | {"use_rslora": True}),
    "DoRA": (Layers, {"target_modules": ["tokens", "conv", "fc"], "use_dora": True}),
    "attention": (Layers, {"target_modules": ["attn"]}),
    "experts": (lambda: Mixture(is_transposed=False), FUSED),
    "experts, transposed": (lambda: Mixture(is_transposed=True), FUSED | {"use_rslora": True}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter_name", ["default", "mine"])
def test_every_layer_type_is_exported_exactly(tmp_path, kind, adapter_name):
    build, settings = KINDS[kind]
    names = [*settings["target_modules"], *settings.get("target_parameters", ())]
    ranks = {rf".*{name.rpartition('.')[2]}": 2 + number for number, name in enumerate(names)}
    alphas = {pattern: 3.0 * rank for rank, pattern in enumerate(ranks, start=1)}
    config = LoraConfig(r=4, lora_alpha=7, rank_pattern=ranks, alpha_pattern=alphas, **settings)
    model = get_peft_model(build(), config, adapter_name=adapter_name).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    batch = {"input_ids": torch.randint(0, 40, (3, 9))}
    with torch.no_grad():
        expected, base = model(**batch), build().eval()(**batch)
    assert (expected - base).abs().max() > 1e-2
    loaded = PeftModel.from_pretrained(build(), export_portable(model, tmp_path / "out", adapter_name=adapter_name))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loaded.merge_and_unload()(**batch), expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_a_grouped_convolution_keeps_its_rank_or_is_refused(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(conv=nn.Conv1d(4, 4, 3, groups=2), fc=nn.Linear(6, 6)))

    same = get_peft_model(build(), LoraConfig(r=4, target_modules=["conv", "fc"]))
    export_portable(same, tmp_path / "same")
    other = get_peft_model(build(), LoraConfig(r=4, target_modules=["conv", "fc"], rank_pattern={"fc": 5}))
    with pytest.raises(EvaError, match=r"groups=2 divides its rank 4 among them and cannot be padded to 5"):
        export_portable(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()
