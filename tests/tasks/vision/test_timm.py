"""Real models of timm with random weights: packed qkv, SwiGLU, registers, convolutions, and a whole run.

timm imports torchvision for its data sets and transforms, of which models need nothing. Where torchvision is missing, a
stand-in is there while timm is imported.
"""

from __future__ import annotations

import enum
import importlib.util
import json
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import evatune
from evatune.cli.main import main
from evatune.errors import EvaError
from evatune.tasks.settings import ModelSettings
from evatune.tasks.vision.classify import Classifier
from evatune.tasks.vision.model import load_classifier, normalization

pytestmark = pytest.mark.slow

_IMPORTED = (
    "transforms",
    "transforms.functional",
    "ops",
    "ops.misc",
    "datasets",
    "models.feature_extraction",
    "models",
)


@pytest.fixture(scope="module")
def imported() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            modes = enum.Enum("InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS")
            torchvision = MagicMock()
            torchvision.transforms.functional.InterpolationMode = modes
            torchvision.ops.misc.FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
            patch.setitem(sys.modules, "torchvision", torchvision)
            for name in _IMPORTED:
                part: Any = torchvision
                for step in name.split("."):
                    part = getattr(part, step)
                patch.setitem(sys.modules, f"torchvision.{name}", part)
        import timm
    return timm


@pytest.fixture
def timm(imported, monkeypatch) -> ModuleType:
    """Timm, which asks no hub for weights."""
    create = imported.create_model

    def unpretrained(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(imported, "create_model", unpretrained)
    return imported


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("test_vit", (1, 0, 4)),
        ("test_vit2", (0, 1, 4)),  # a register, no class token
        ("eva02_tiny_patch14_224", (1, 0, 4)),
        ("test_resnet", (0, 0, 0)),
    ],
)
def test_heads_and_kinds_of_tokens(timm, name, tokens):
    settings = ModelSettings(name=f"timm/{name}")
    size = 32 if name.startswith("test_vit") else 28
    model = load_classifier(settings, n_classes=3, size=size)
    layout = model.layout
    assert (layout.class_tokens, layout.registers, layout.patches) == tokens
    assert model(pixel_values=torch.randn(2, 3, size, size)).logits.shape == (2, 3)
    assert normalization(settings)[0] == timm.get_pretrained_cfg(name).mean


def test_a_name_that_timm_does_not_have(timm):
    with pytest.raises(EvaError, match=r"timm cannot make 'vit_tine': Unknown model \(vit_tine\)\.$"):
        load_classifier(ModelSettings(name="timm/vit_tine"), n_classes=3, size=28)


@pytest.mark.parametrize("method", ["eva", "lora"])
def test_packed_layers_from_pictures_to_a_classifier(timm, photos, tmp_path, method):
    output = tmp_path / "run"
    arguments = ["--model", "timm/eva02_tiny_patch14_224", "--data", str(photos), "--image-size", "28", "--rank", "4"]
    arguments += ["--method", method, "--steps", "6", "--batch-size", "8", "--learning-rate", "5e-3"]
    assert main(["finetune", "--task", "vision", *arguments, "--output", str(output)]) == 0
    assert json.loads((output / "run.json").read_text())["after"]["metrics"]["accuracy"] == 1.0

    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    kinds = {name.split(".blocks.")[1].split(".", 1)[1] for name in weights if ".blocks." in name}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert kinds == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    if method == "eva":
        ranks = json.loads((output / "plan.json").read_text())["ranks"]
        assert sum(rank for rank in ranks.values()) == 4 * 12 * len(layers)
    answer = Classifier.load(output / "adapter")([photos / "red" / "00.png"])[0]
    assert next(iter(answer)) == "red"


@pytest.mark.parametrize("layer", ["attn.qkv", "mlp.fc1", "mlp.fc2"])
def test_packed_layers_are_measured_at_their_own_input(timm, layer):
    """`qkv`, and the gate and the value of a SwiGLU (`fc1`), are one matrix each, which reads one input."""
    model = load_classifier(ModelSettings(name="timm/eva02_tiny_patch14_224"), n_classes=3, size=28)
    pixels, name, seen = torch.randn(16, 3, 28, 28), f"backbone.blocks.3.{layer}", []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(pixel_values=pixels)
    handle.remove()
    spectra = evatune.measure(
        model, [{"pixel_values": pixels}], target_modules=[name], n_components=4, backend="exact", tau=None,
        min_gain=None, progress=False,
    )  # fmt: skip
    rows = seen[0].flatten(0, -2).double()
    _, values, components = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    spectrum = spectra[name]
    assert spectrum.n_rows == 16 * 5  # the class token and four patches
    torch.testing.assert_close(spectrum.singular_values.double(), values[:4], rtol=1e-3, atol=0)
    overlap = (spectrum.components.double() @ components[:4].T).diagonal().abs()
    torch.testing.assert_close(overlap, torch.ones(4).double(), rtol=0, atol=1e-3)
