"""What is known of a vision task before its model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evatune.tasks.outline import Outline, parameters_of, read_shape
from evatune.tasks.rows import may_be_hub_id
from evatune.tasks.vision.model import ImageClassifier, is_timm, timm_model
from evatune.tasks.vision.sources import DIGITS, FILES
from evatune.tasks.vision.vtab import N_EXAMPLES, PREFIX, find_task

if TYPE_CHECKING:
    from evatune.tasks.vision.task import Vision

_CLASSES = 10


def outline(task: Vision) -> Outline:
    """Return columns, number of pictures and the model's shape; see `evatune.tasks.task.Task.outline`."""
    data, source = task.data, task.source
    config, notes = (None, []) if is_timm(source) else read_shape(source)
    away = [name for name in data.train if name != DIGITS and may_be_hub_id(name, suffixes=FILES)]
    vtab = next((name for name in data.train if name.startswith(PREFIX)), None)
    n_classes, n_examples = _CLASSES, data.train_size
    if vtab is not None:
        n_classes, n_examples = find_task(vtab).classes, N_EXAMPLES * 4 // 5 if data.validate else N_EXAMPLES
    if away and (vtab is None or data.vtab_folder is None):
        notes += [f"the pictures of {', '.join(away)} are on a hub, so they were not looked at"]
        notes += [f"their classes are unknown, and {_CLASSES} are assumed"] if vtab is None else []
        notes += ["without data.train_size their number is unknown"] if n_examples is None else []
    elif data.train:
        n_examples, n_classes = len(task.found.train), len(task.found.classes)
    else:
        notes += ["no training data were given (data.train, --data)"]

    def build() -> nn.Module:
        from transformers import AutoModel

        size = data.image_size
        if is_timm(source):
            return ImageClassifier(timm_model(source, size=size, pretrained=False), n_classes=n_classes, size=size)
        backbone = AutoModel.from_config(config, **parameters_of(source))
        return ImageClassifier(getattr(backbone, "vision_model", backbone), n_classes=n_classes, size=size)

    def batch(size: int) -> dict[str, Tensor]:
        pixels = torch.zeros(size, 3, data.image_size, data.image_size)
        return {"pixel_values": pixels, "labels": torch.zeros(size, dtype=torch.long)}

    return Outline(
        columns="a folder of pictures for each class, or tables with pictures "
        f"({data.image_column or 'image, ...'}) and classes ({data.label_column or 'label, ...'})",
        n_examples=n_examples,
        build=build if is_timm(source) or config is not None else None,
        batch=batch,
        sample=f"{data.image_size} x {data.image_size} pixels",
        unchecked=tuple(notes),
    )
