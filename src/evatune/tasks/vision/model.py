"""An image classifier: any pretrained vision model without its head, and a new linear head.

Shapes: B pictures in a batch, S side of a picture, T tokens a picture, d features, K classes.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from evatune.errors import EvaError
from evatune.models import load_model
from evatune.tasks.settings import ModelSettings
from evatune.tasks.task import evaluating
from evatune.tasks.vision.images import IMAGENET

HEAD_STD = 2e-5
"""Standard deviation of a new head's weights (the paper's Appendix D); its biases are zero."""
HEAD = "classifier"
"""Name of the head inside the model."""
_HEAD_FILE = "classifier.safetensors"
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "distillation_token", "dist_token")
_REGISTERS = ("register_tokens", "reg_token")
_TIMM = ("timm/", "timm:", "hf-hub:timm/")


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """What the T tokens of a picture are: class tokens first, then registers, then patches."""

    class_tokens: int = 0
    """Tokens that stand for the whole picture; two in distilled models."""
    registers: int = 0
    """Tokens that stand for nothing."""
    patches: int = 0
    """Tokens of patches; 0 if a model has no other tokens to distinguish them from."""

    def mask(self, kind: str) -> Tensor:
        """Return which tokens are of a kind: `class`, `register`, `patch`, as booleans (T,).

        Raises:
            EvaError: the model has none of them.
        """
        sizes = {"class": self.class_tokens, "register": self.registers, "patch": self.patches}
        if not sizes.get(kind):
            having = " and ".join(name for name, size in sizes.items() if size)
            raise EvaError(
                f"this model has no {kind} tokens that could be measured ({having or 'none can be told apart'}); "
                "set measure_tokens to all."
            )
        return torch.cat([torch.full((size,), name == kind) for name, size in sizes.items()])


class ImageClassifier(nn.Module):
    """A backbone and a linear head.

    The input of the head is the backbone's pooled output if that is pretrained (the class token of DINOv2), else its
    class token, else the mean of its tokens.

    Args:
        backbone: a vision model of transformers, or of timm without its classifier; it is taken over.
        n_classes: K.
        size: S in pixels; one black picture is passed to learn the shapes.

    Raises:
        EvaError: the backbone takes no pictures, or none of this size.
    """

    def __init__(self, backbone: Any, *, n_classes: int, size: int) -> None:
        super().__init__()
        pooler = getattr(backbone, "pooler", None)
        if isinstance(pooler, nn.Module) and any(isinstance(module, nn.Linear) for module in pooler.modules()):
            backbone.pooler = None  # a dense layer that is not pretrained
        self.backbone = backbone
        self._is_timm = not hasattr(backbone, "config")
        self.name_or_path = getattr(backbone, "name_or_path", "")
        if hasattr(getattr(backbone, "config", None), "mask_ratio"):
            backbone.config.mask_ratio = 0.0  # otherwise masked autoencoders drop patches
        self.layout, width = self._shapes(size)
        device = next(backbone.parameters()).device
        self.classifier = nn.Linear(width, n_classes, device=device)
        nn.init.normal_(self.classifier.weight, std=HEAD_STD)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Return logits (B, K), and the mean cross-entropy if there are labels.

        Args:
            pixel_values: (B, 3, S, S), normalized.
            labels: (B,), numbers of classes.
        """
        _, pooled_bd = self._features(pixel_values)
        logits_bk = self.classifier(pooled_bd.to(self.classifier.weight.dtype))
        loss = None if labels is None else nn.functional.cross_entropy(logits_bk.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits_bk)  # type: ignore[arg-type]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Switch on gradient checkpointing of the backbone."""
        if self._is_timm:
            self.backbone.set_grad_checkpointing()
        else:
            self.backbone.gradient_checkpointing_enable(**options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the backbone as transformers does, and the head beside it.

        Raises:
            EvaError: the backbone is timm's.
        """
        if self._is_timm:
            raise EvaError("a timm model is not saved whole; fine-tune an adapter instead of method full.")
        self.backbone.save_pretrained(folder, **options)
        save_file(self.classifier.state_dict(), Path(folder) / _HEAD_FILE)

    def _features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden state, (B, T, d) or (B, d, height, width), and what stands for the picture, (B, d)."""
        backbone = self.backbone
        pixel_values = pixel_values.to(next(backbone.parameters()).dtype)
        if self._is_timm:
            hidden = backbone.forward_features(pixel_values)
            return hidden, backbone.forward_head(hidden, pre_logits=True)
        resizes = "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
        output = backbone(pixel_values=pixel_values, **({"interpolate_pos_encoding": True} if resizes else {}))
        hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = hidden[:, 0] if _tokens(backbone, _CLASS_TOKENS) else hidden.mean(1)
        return hidden, pooled.flatten(1)

    def _shapes(self, size: int) -> tuple[TokenLayout, int]:
        """Return what the tokens are, and d."""
        device = next(self.backbone.parameters()).device
        try:
            with torch.inference_mode(), evaluating(self.backbone):
                hidden, pooled = self._features(torch.zeros(1, 3, size, size, device=device))
        except (ValueError, RuntimeError, TypeError, AssertionError, AttributeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise EvaError(
                f"{type(self.backbone).__name__} takes no pictures of 3 x {size} x {size}: {reason}; is it a vision "
                "model, and is data.image_size right for it?"
            ) from error
        classes, registers = _tokens(self.backbone, _CLASS_TOKENS), _tokens(self.backbone, _REGISTERS)
        if not (classes or registers) or hidden.ndim != 3:
            return TokenLayout(), pooled.shape[-1]
        patches = hidden.shape[1] - classes - registers
        return TokenLayout(class_tokens=classes, registers=registers, patches=patches), pooled.shape[-1]


def _tokens(backbone: nn.Module, names: tuple[str, ...]) -> int:
    """Return how many tokens are parameters with one of these names."""
    own = {name.rpartition(".")[2]: parameter for name, parameter in backbone.named_parameters()}
    return sum(own[name].numel() // own[name].shape[-1] for name in names if name in own)


def load_classifier(settings: ModelSettings, *, n_classes: int, size: int) -> ImageClassifier:
    """Load a pretrained vision model and give it a new head; or a classifier that was saved whole.

    Args:
        settings: which model; `timm/NAME` is one of timm's.
        n_classes: K.
        size: S in pixels.

    Raises:
        EvaError: there is no such model, it takes no pictures, or it was saved with another number of classes.
    """
    if is_timm(settings):
        return ImageClassifier(timm_model(settings, size=size), n_classes=n_classes, size=size)
    model: Any = load_model(
        settings.name,
        dtype=settings.dtype,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        head="base",
    )
    classifier = ImageClassifier(getattr(model, "vision_model", model), n_classes=n_classes, size=size)
    head = Path(settings.name).expanduser() / _HEAD_FILE
    if head.is_file():
        state = load_file(head)
        if state["weight"].shape != classifier.classifier.weight.shape:
            raise EvaError(
                f"{head} has {len(state['weight'])} classes, but the data have {n_classes}; remove that file for a new "
                "head."
            )
        classifier.classifier.load_state_dict(state)
    return classifier.eval()


def normalization(settings: ModelSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation that a model's own processor subtracts and divides by, else ImageNet's."""
    if is_timm(settings):
        config = _timm().get_pretrained_cfg(_timm_name(settings.name))
        return (tuple(config.mean), tuple(config.std)) if config is not None else IMAGENET
    from transformers.utils import cached_file

    try:
        path = cached_file(settings.name, "preprocessor_config.json", revision=settings.revision)
        content = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        return tuple(content["image_mean"]), tuple(content["image_std"])
    except (OSError, ValueError, KeyError):  # not every model says
        return IMAGENET


def is_timm(settings: ModelSettings) -> bool:
    """Return whether a model is one of timm's."""
    return settings.name.startswith(_TIMM)


def timm_model(settings: ModelSettings, *, size: int, pretrained: bool = True) -> Any:
    """Return a model of timm without its head.

    Args:
        settings: which model.
        size: S in pixels.
        pretrained: load its weights.

    Raises:
        EvaError: timm is not installed, or cannot make it.
    """
    timm, name = _timm(), _timm_name(settings.name)
    try:
        try:
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size)
        except TypeError:  # convolutional models take every size, and no such argument
            model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # the hub client raises errors of many libraries
        raise EvaError(f"timm cannot make {name!r}: {str(error).splitlines()[0].rstrip('.')}.") from error
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):  # EVA-02, BEiT, Swin V2
            module.qkv_bias_separate = True  # else the weight of `qkv` is used past the layer and its adapter
    model.name_or_path = settings.name
    return model.to(getattr(torch, settings.dtype))


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise EvaError(f"models of timm need the Python package timm ({error}); run: pip install timm.") from None
    return timm


def _timm_name(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _TIMM if name.startswith(prefix)), name)
