"""Adapters on disk: what is written, and that it comes back."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file

from evatune import prepare
from evatune.adapters import export_portable, save_adapter
from evatune.adapters.attach import load_adapter

TOKENS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_frozen_weights_of_a_head_that_is_a_target_are_not_written(method, llama, tmp_path):
    model = prepare(llama(), method=method, rank=4, target_modules=["q_proj", "lm_head"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "adapter")
        if method == "lora":
            export_portable(model, tmp_path / "portable")
            assert not (tmp_path / "portable" / "README.md").exists()
            portable = load_file(tmp_path / "portable" / "adapter_model.safetensors")
            assert all("lora_" in name for name in portable)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lm_head" in name for name in names)
    assert all("lora_" in name for name in names)
    loaded = load_adapter(llama(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(TOKENS).logits, model.eval()(TOKENS).logits, atol=1e-4)
