"""What is known of a vision task before its model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evatune.tasks.outline import Outline, count_examples, parameters_of, read_shape, without_share
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
    here = vtab is not None and data.vtab_folder is not None
    n_examples, more = count_examples(
        data.train,
        lambda: len(task.found.train),
        away=[] if here else away,
        stated=(data.max_train_examples or N_EXAMPLES) if vtab else data.train_size,
        limit=data.max_train_examples,
    )
    n_classes = _CLASSES if vtab is None else find_task(vtab).classes
    if not more:
        n_classes = len(task.found.classes)
    elif data.train and vtab is None:
        more.append(f"the classes are unknown, and {_CLASSES} are assumed")
    if more and n_examples is not None:
        # A share is for the report, where there are no other pictures for it, and one for a search.
        for _ in range(data.validate + (vtab is None and not data.eval)):
            n_examples = without_share(n_examples, data.held_out)

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
        unchecked=(*notes, *more),
    )
