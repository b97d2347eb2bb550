"""The classifier around any backbone: what its head reads, its kinds of tokens, saving, and timm's models."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from tests.on_device import IN_INFERENCE_MODE, TEST_DEVICE
from torch import nn
from transformers import AutoModel

from evatune.errors import EvaError
from evatune.tasks.settings import ModelSettings
from evatune.tasks.vision.images import IMAGENET
from evatune.tasks.vision.model import ImageClassifier, load_classifier, normalization

VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
SQUARE = {"image_size": 28, "patch_size": 14}

FAMILIES = {
    "vit": (transformers.ViTConfig(**VIT, **SQUARE), (1, 0, 9)),
    "dinov2": (
        transformers.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, **SQUARE),
        (1, 0, 9),
    ),
    "dinov2 swiglu": (
        transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, use_swiglu_ffn=True, **SQUARE
        ),
        (1, 0, 9),
    ),
    "dinov2 registers": (
        transformers.Dinov2WithRegistersConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_register_tokens=3, **SQUARE
        ),
        (1, 3, 9),
    ),
    "dinov3": (transformers.DINOv3ViTConfig(num_register_tokens=2, **VIT, **SQUARE), (1, 2, 9)),
    "deit": (transformers.DeiTConfig(**VIT, **SQUARE), (2, 0, 9)),
    "beit": (transformers.BeitConfig(**VIT, **SQUARE), (1, 0, 9)),
    "mae": (transformers.ViTMAEConfig(**VIT, **SQUARE), (1, 0, 9)),
    "clip": (
        transformers.CLIPConfig(
            text_config={**VIT, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}, vision_config={**VIT, **SQUARE}
        ),
        (1, 0, 9),
    ),
    "siglip": (transformers.SiglipVisionConfig(**VIT, **SQUARE), (0, 0, 0)),
    "swin": (
        transformers.SwinConfig(
            embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=28, window_size=7, patch_size=2
        ),
        (0, 0, 0),
    ),
    "convnext": (transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), (0, 0, 0)),
    "resnet": (transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), (0, 0, 0)),
}


def backbone(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModel.from_config(FAMILIES[family][0])
    return getattr(model, "vision_model", model).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.on_hardware(IN_INFERENCE_MODE)
def test_every_family_classifies_at_another_size(family):
    model = ImageClassifier(backbone(family), n_classes=5, size=42)
    layout = model.layout
    assert (layout.class_tokens, layout.registers, layout.patches) == FAMILIES[family][1]
    output = model(pixel_values=torch.randn(2, 3, 42, 42), labels=torch.tensor([0, 4]))
    assert output.logits.shape == (2, 5)
    # A new head knows nothing: all classes are equally likely.
    assert output.loss.item() == pytest.approx(torch.tensor(5.0).log().item(), abs=2e-3)
    assert not torch.equal(output.logits[0], output.logits[1])


@pytest.mark.on_hardware(IN_INFERENCE_MODE)
def test_the_head_reads_the_normalized_class_token():
    base = backbone("dinov2")
    model = ImageClassifier(base, n_classes=3, size=28).eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = model.classifier(base(pixel_values=pixels).last_hidden_state[:, 0])
        assert torch.equal(model(pixel_values=pixels).logits, expected)


@pytest.mark.on_hardware(IN_INFERENCE_MODE)
def test_a_pooler_that_was_never_pretrained_is_left_out():
    base = backbone("vit")
    assert any("pooler" in name for name, _ in base.named_parameters())
    model = ImageClassifier(base, n_classes=3, size=28)
    assert not any("pooler" in name for name, _ in model.named_parameters())
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = model.classifier(base(pixel_values=pixels).last_hidden_state[:, 0])
        assert torch.equal(model(pixel_values=pixels).logits, expected)


@pytest.mark.on_hardware(IN_INFERENCE_MODE)
def test_the_new_head_is_as_in_the_paper():
    torch.manual_seed(0)
    model = ImageClassifier(backbone("dinov2"), n_classes=400, size=28)
    weight = model.classifier.weight
    assert weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert abs(weight.mean().item()) < 1e-6
    assert not model.classifier.bias.any()


@pytest.mark.on_hardware(IN_INFERENCE_MODE)
def test_masks_of_tokens():
    layout = ImageClassifier(backbone("dinov2 registers"), n_classes=2, size=28).layout
    assert layout.mask("class").tolist() == [True] + 7 * [False]
    assert layout.mask("register").tolist() == [False] + 3 * [True] + 4 * [False]
    assert layout.mask("patch").tolist() == 4 * [False] + 4 * [True]
    with pytest.raises(EvaError, match=r"no register tokens that could be measured \(class and patch\)"):
        ImageClassifier(backbone("dinov2"), n_classes=2, size=28).layout.mask("register")
    with pytest.raises(EvaError, match=r"no patch tokens that could be measured \(none can be told apart\)"):
        ImageClassifier(backbone("swin"), n_classes=2, size=28).layout.mask("patch")


def test_a_language_model_takes_no_pictures(tiny_model):
    with pytest.raises(EvaError, match=r"LlamaModel takes no pictures of 3 x 28 x 28: .*; is it a vision model"):
        load_classifier(ModelSettings(name=str(tiny_model)), n_classes=2, size=28)


def test_pictures_too_small_for_a_patch_are_refused(tiny_vit):
    with pytest.raises(EvaError, match="takes no pictures of 3 x 8 x 8"):
        load_classifier(ModelSettings(name=str(tiny_vit)), n_classes=2, size=8)


def test_a_whole_classifier_is_saved_and_loaded_with_its_head(tiny_vit, tmp_path):
    model = load_classifier(ModelSettings(name=str(tiny_vit)), n_classes=3, size=28).to(TEST_DEVICE)
    nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    settings = ModelSettings(name=str(tmp_path))
    again = load_classifier(settings, n_classes=3, size=28).to(TEST_DEVICE)
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.equal(model(pixel_values=pixels).logits, again(pixel_values=pixels).logits)
    with pytest.raises(EvaError, match="has 3 classes, but the data have 2; remove that file for a new head"):
        load_classifier(settings, n_classes=2, size=28)


def test_half_precision_bases_keep_a_head_in_float32(tiny_vit):
    settings = ModelSettings(name=str(tiny_vit), dtype="bfloat16")
    model = load_classifier(settings, n_classes=3, size=28).to(TEST_DEVICE)
    assert model.classifier.weight.dtype == torch.float32
    assert model(pixel_values=torch.randn(1, 3, 28, 28)).logits.dtype == torch.float32


def test_a_models_own_normalization(tiny_vit, tmp_path):
    assert normalization(ModelSettings(name=str(tiny_vit))) == IMAGENET
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.4, 0.4, 0.4]}')
    assert normalization(ModelSettings(name=str(tmp_path))) == ((0.5, 0.5, 0.5), (0.4, 0.4, 0.4))


class TimmLike(nn.Module):
    """What of timm's vision transformers is used: packed qkv, class token, features and head apart."""

    qkv_bias_separate = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.reg_token = nn.Parameter(torch.zeros(1, 2, 16))
        self.patch_embed = nn.Conv2d(3, 16, 14, 14)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.size = size

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == self.size, "input size differs from the model's"
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), patches], 1)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        return tokens + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        assert pre_logits
        return x[:, 0]


@pytest.fixture
def timm(monkeypatch):
    made = []

    def create_model(name, *, pretrained, num_classes, **options):
        made.append((name, pretrained, num_classes, options))
        if name == "convnet" and options:
            raise TypeError("ConvNet.__init__() got an unexpected keyword argument 'img_size'")
        if name not in ("vit_tiny", "convnet"):
            raise RuntimeError(f"Unknown model ({name})\nand much more")
        return TimmLike(options.get("img_size", 42))

    config = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    fake = SimpleNamespace(create_model=create_model, get_pretrained_cfg=lambda name: config)
    monkeypatch.setitem(sys.modules, "timm", fake)
    return made


@pytest.mark.on_hardware(IN_INFERENCE_MODE)
def test_timm_models(timm):
    settings = ModelSettings(name="timm/vit_tiny")
    model = load_classifier(settings, n_classes=3, size=28)
    assert timm[-1] == ("vit_tiny", True, 0, {"img_size": 28})
    assert (model.layout.class_tokens, model.layout.registers, model.layout.patches) == (1, 2, 4)
    assert model(pixel_values=torch.randn(2, 3, 28, 28)).logits.shape == (2, 3)
    assert normalization(settings) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert model.backbone.qkv_bias_separate  # `qkv` is called, and not its weight used past an adapter
    load_classifier(ModelSettings(name="timm/convnet"), n_classes=3, size=42)
    assert timm[-1] == ("convnet", True, 0, {})
    with pytest.raises(EvaError, match=r"timm cannot make 'vit_tine': Unknown model \(vit_tine\)\.$"):
        load_classifier(ModelSettings(name="timm/vit_tine"), n_classes=3, size=28)
    with pytest.raises(EvaError, match="timm model is not saved whole"):
        model.save_pretrained("nowhere")


def test_timm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(EvaError, match=r"need the Python package timm \(.*\); run: pip install timm"):
        load_classifier(ModelSettings(name="timm/vit_tiny"), n_classes=3, size=28)
