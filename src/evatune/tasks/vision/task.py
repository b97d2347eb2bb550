"""The task of vision: a pretrained vision model learns the classes of pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from evatune.files import write_text
from evatune.tasks.classes import check_classes, write_classes
from evatune.tasks.outline import Outline
from evatune.tasks.scores import Scores
from evatune.tasks.settings import ModelSettings
from evatune.tasks.task import Needs, Preview
from evatune.tasks.vision.classify import PIXELS
from evatune.tasks.vision.dataset import Found, Pictures, check_pictures, collate, find_pictures, shuffled
from evatune.tasks.vision.evaluation import evaluate
from evatune.tasks.vision.images import IMAGENET, Preprocessing
from evatune.tasks.vision.model import HEAD, ImageClassifier, load_classifier, normalization
from evatune.tasks.vision.outline import outline
from evatune.tasks.vision.settings import VisionData
from evatune.tasks.vision.sheet import contact_sheet
from evatune.tasks.vision.sources import Picture

_NAMED = 5
"""Pictures of a kind that a record names, and classes that an error names."""


def open_task(data: VisionData, *, model: ModelSettings, seed: int) -> Vision:
    """Return the task; see `evatune.tasks.open_task`."""
    return Vision(data=data, source=model, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Vision:
    """Pictures and their classes for a vision model; see `evatune.tasks.task.Task`."""

    data: VisionData
    source: ModelSettings
    seed: int

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes pixels."""
        mean, std = normalization(self.source) if self.data.normalization == "auto" else IMAGENET
        return Preprocessing(size=self.data.image_size, fit=self.data.fit, mean=mean, std=std)

    @cached_property
    def found(self) -> Found:
        """Which pictures are learned and which are held out; none is decoded."""
        return find_pictures(self.data)

    @cached_property
    def train(self) -> Pictures:
        """The training pictures."""
        return self._checked(shuffled(self.found.train, self.seed), others=self.found.held_out)

    @cached_property
    def held_out(self) -> Pictures:
        """The held-out pictures."""
        return self._checked(self.found.held_out, others=self.found.train)

    def kinds(self) -> list[str]:
        """Return the class of each training picture."""
        return [self.train.classes[label] for label in self.train.labels]

    def outline(self) -> Outline:
        """Return what is known without weights and without a hub."""
        return outline(self)

    def load_model(self) -> ImageClassifier:
        """Return the pretrained model with a head for the classes of the training pictures."""
        return load_classifier(self.source, n_classes=len(self.found.classes), size=self.data.image_size)

    def needs(self, model: Any) -> Needs:
        """Return what the model needs: its head is new, and some tokens may not be measured."""
        kind = self.data.measure_tokens
        return Needs(heads=(HEAD,), row_mask=None if kind == "all" else partial(_rows, model.layout.mask(kind)))

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return pictures as a batch of normalized pixels and labels."""
        return collate(rows, self.preprocessing)

    def evaluate(self, model: Any, *, limit: int | None = None, bf16: bool = False, progress: bool = True) -> Scores:
        """Score a model on held-out pictures."""
        return evaluate(model, self.held_out, self.collate, limit=limit, bf16=bf16, progress=progress)

    def preview(self, n: int) -> Preview:
        """Return the first pictures as a contact sheet, with their classes."""
        pictures = self._checked(shuffled(self.found.train, self.seed)[:n])
        rows = [pictures[index] for index in range(len(pictures))]
        content = [
            {"picture": picture.name, "class": pictures.classes[row["label"]]}
            for picture, row in zip(pictures.checked.pictures, rows, strict=True)
        ]
        pixels = self.preprocessing.restore(self.collate(rows)["pixel_values"])
        size = self.data.image_size
        return Preview(
            text="\n".join(f"{item['class']:<20} {item['picture']}, seen at {size} x {size}" for item in content),
            content=content,
            picture=contact_sheet(pixels, [str(item["class"]) for item in content]),
        )

    def summary(self) -> str:
        """Return how many pictures, of how many classes, from where."""
        source = ", ".join(Path(name).name if Path(name).exists() else name for name in self.data.train)
        return (
            f"{len(self.train)} pictures of {len(self.train.classes)} classes from {source}{self.train.notes()}, "
            f"{len(self.held_out)} held out{self.held_out.notes()}"
        )

    def facts(self) -> dict[str, Any]:
        """Return the counts and the pixels for the record."""
        sizes = Counter(self.train.labels)
        return {
            "train": len(self.train),
            "held_out": len(self.held_out),
            "classes": {name: sizes[number] for number, name in enumerate(self.train.classes)},
            "converted": {
                kind: {"count": len(names), "first": names[:_NAMED]}
                for kind, names in self.train.checked.converted.items()
            },
            "skipped": self.train.checked.skipped | self.held_out.checked.skipped,
            "normalization": {"mean": list(self.preprocessing.mean), "std": list(self.preprocessing.std)},
            "measured_tokens": self.data.measure_tokens,
        }

    def save_processor(self, folder: Path) -> None:
        """Write `preprocessor_config.json`, as transformers reads it, and `classes.json`."""
        write_text(folder / PIXELS, json.dumps(self.preprocessing.to_json(), indent=2) + "\n")
        write_classes(folder, list(map(str, self.found.classes)))

    def check_saved(self, folder: Path) -> None:
        """Check that a folder, if it holds a classifier, is for the classes of these data."""
        way_out = "name pictures to score with --eval, in folders of the same classes"
        check_classes(folder, list(map(str, self.found.classes)), way_out=way_out)

    def _checked(self, pictures: Sequence[Picture], *, others: Sequence[Picture] = ()) -> Pictures:
        skip = self.data.bad_images == "skip"
        return check_pictures(pictures, self.found.classes, self.preprocessing, skip=skip, others=others)


def _rows(mask_t: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mask of the tokens of one picture for all of a batch, (B, T)."""
    return mask_t.expand(len(batch["pixel_values"]), -1)
