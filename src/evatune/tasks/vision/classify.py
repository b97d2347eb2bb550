"""Using what was trained: the classes of new pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evatune.adapters.attach import load_adapter
from evatune.errors import EvaError
from evatune.tasks.classes import CLASSES
from evatune.tasks.settings import ModelSettings
from evatune.tasks.vision.images import BadPicture, Preprocessing, decode
from evatune.tasks.vision.model import load_classifier
from evatune.tasks.vision.sources import Content

PIXELS = "preprocessor_config.json"
"""How pictures are read, beside a trained model or adapter."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A trained model with its classes and its way of reading pictures.

    Example:
        >>> classifier = Classifier.load("runs/photos/adapter")  # doctest: +SKIP
        >>> classifier(["holiday.jpg"])  # doctest: +SKIP
        [{'beach': 0.97, 'forest': 0.02, 'town': 0.01}]
    """

    model: Any
    """An `ImageClassifier`, with or without adapter."""
    classes: tuple[str, ...]
    """Names of the classes 0, 1, ..."""
    preprocessing: Preprocessing
    """How a picture becomes pixels."""

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, model: str | None = None) -> Classifier:
        """Load what a run trained.

        Args:
            folder: `adapter/` or `model/` of a run.
            model: the base model, where it is not where it was.

        Raises:
            EvaError: the folder holds no image classifier, or the base model is not there.
        """
        folder = Path(folder).expanduser()
        missing = next((name for name in (CLASSES, PIXELS) if not (folder / name).is_file()), None)
        if missing:
            raise EvaError(f"{folder} holds no trained image classifier: it has no {missing}.")
        classes = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
        preprocessing = Preprocessing.from_json(json.loads((folder / PIXELS).read_text(encoding="utf-8")))
        config = folder / "adapter_config.json"
        base = model or str(folder)
        if config.is_file():
            base = model or json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
        classifier: Any = load_classifier(ModelSettings(name=base), n_classes=len(classes), size=preprocessing.size)
        if config.is_file():
            classifier = load_adapter(classifier, folder)
        return cls(model=classifier.eval(), classes=tuple(classes), preprocessing=preprocessing)

    def __call__(
        self, pictures: Sequence[str | os.PathLike[str] | Content], *, batch_size: int = 64
    ) -> list[dict[str, float]]:
        """Return the probability of each class for each picture, the most probable class first.

        Args:
            pictures: files, encoded pictures, or pixels.
            batch_size: pictures in a forward pass.

        Raises:
            EvaError: a picture cannot be decoded.
        """
        device, answers = next(self.model.parameters()).device, []
        for start in range(0, len(pictures), batch_size):
            pixels = torch.stack([self._pixels(picture) for picture in pictures[start : start + batch_size]])
            with torch.inference_mode():
                logits = self.model(pixel_values=self.preprocessing.normalize(pixels).to(device)).logits
            for probabilities in logits.float().softmax(dim=-1).tolist():
                ranked = sorted(zip(self.classes, probabilities, strict=True), key=lambda item: -item[1])
                answers.append(dict(ranked))
        return answers

    def _pixels(self, picture: Any) -> torch.Tensor:
        content = Path(picture).expanduser() if isinstance(picture, str | os.PathLike) else picture
        try:
            image, _ = decode(content)
        except BadPicture as reason:
            name = content if isinstance(content, Path) else "a picture"
            raise EvaError(f"{name} {reason}.") from None
        return torch.from_numpy(self.preprocessing.resize(image).copy())
