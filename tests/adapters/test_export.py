from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

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
