"""The training pictures and the held-out pictures of a task, drawn, divided, checked and numbered by class."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from evatune.errors import EvaError, near_misses
from evatune.tasks.vision.images import Checked, Preprocessing, check, decode
from evatune.tasks.vision.settings import VisionData
from evatune.tasks.vision.sources import Columns, Picture, Source, has_test_split, read_source
from evatune.tasks.vision.vtab import N_EXAMPLES, PREFIX, find_task, read_task

Label = int | str

_DRAW_SEED = 0
"""Which pictures belong to a data set does not depend on the seed of a run."""


@dataclass(frozen=True, kw_only=True)
class Pictures(Dataset[dict[str, Any]]):
    """Pictures of one split, ready for a data loader."""

    checked: Checked
    """The pictures."""
    labels: tuple[int, ...]
    """Class of each."""
    classes: tuple[str, ...]
    """Names of the classes 0, 1, ..."""
    preprocessing: Preprocessing
    """How they are resized and normalized."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `pixels` (S, S, 3), bytes, and the number of the class, `label`."""
        if self.checked.pixels is not None:
            pixels = self.checked.pixels[index]
        else:
            image, _ = decode(self.checked.pictures[index].read())
            pixels = torch.from_numpy(self.preprocessing.resize(image).copy())
        return {"pixels": pixels, "label": self.labels[index]}

    def notes(self) -> str:
        """Return the conversions of pictures that were needed, or an empty string."""
        done = [f"{len(names)} with {kind}" for kind, names in self.checked.converted.items()]
        done += [f"{len(self.checked.skipped)} skipped"] if self.checked.skipped else []
        return f" ({', '.join(done)})" if done else ""


def collate(rows: Sequence[dict[str, Any]], preprocessing: Preprocessing) -> dict[str, Tensor]:
    """Return `pixel_values` (B, 3, S, S), normalized, and `labels` (B,)."""
    return {
        "pixel_values": preprocessing.normalize(torch.stack([row["pixels"] for row in rows])),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


@dataclass(frozen=True, kw_only=True)
class Found:
    """The pictures of a task before any is decoded."""

    train: tuple[Picture, ...]
    """Training pictures, in an order in which the first n have the classes in their shares, for every n."""
    held_out: tuple[Picture, ...]
    """Pictures to score on, likewise."""
    classes: tuple[Label, ...]
    """All classes in their order."""


def find_pictures(data: VisionData) -> Found:
    """Return which pictures are learned and which are held out; it does not depend on the seed of a run.

    Raises:
        EvaError: a source is not there or holds nothing, there are less than two classes, or the classes of two sources
            do not fit together.
    """
    task = next((name for name in data.train if name.startswith(PREFIX)), None)
    if task is None:
        train, held_out = _read(data.train, data.train_split, data), _read_held_out(data)
    elif len(data.train) > 1 or data.eval:
        raise EvaError(f"{task} has training and test pictures of its own; leave out the other sources.")
    else:
        first, second = read_task(task, folder=data.vtab_folder, validate=data.validate)
        train, held_out = [first], [second] if second else []
    classes = _classes(train, held_out, task=task)
    kept = _draw(_pictures(train), data.max_train_examples or (N_EXAMPLES if task else None))
    scored = _pictures(held_out)
    if not scored:
        scored, kept = _part(kept, data.held_out, seed=_DRAW_SEED + 1)
        if data.validate and task is None and not _has_test_pictures(data):  # what was drawn is for the report
            scored, kept = _part(kept, data.held_out, seed=_DRAW_SEED + 2)
    return Found(train=tuple(kept), held_out=tuple(_draw(scored, data.max_eval_examples)), classes=classes)


def check_pictures(
    pictures: Sequence[Picture],
    classes: Sequence[Label],
    preprocessing: Preprocessing,
    *,
    skip: bool,
    others: Sequence[Picture] = (),
    progress: bool = True,
) -> Pictures:
    """Return pictures as a data set, in their order; see `evatune.tasks.vision.images.check`."""
    checked = check(pictures, preprocessing, skip=skip, others=others, progress=progress)
    numbers = {label: number for number, label in enumerate(classes)}
    return Pictures(
        checked=checked,
        labels=tuple(numbers[picture.label] for picture in checked.pictures),
        classes=tuple(map(str, classes)),
        preprocessing=preprocessing,
    )


def shuffled(pictures: Sequence[Picture], seed: int) -> list[Picture]:
    """Return pictures in an order that depends on the seed alone."""
    order = list(pictures)
    random.Random(seed).shuffle(order)
    return order


def _read(names: Sequence[str], split: str, data: VisionData) -> list[Source]:
    columns = Columns(image=data.image_column, label=data.label_column)
    return [read_source(name, split=split, hub_config=data.hub_config, columns=columns) for name in names]


def _has_test_pictures(data: VisionData) -> bool:
    return bool(data.eval) or all(map(has_test_split, data.train))


def _read_held_out(data: VisionData) -> list[Source]:
    if data.validate or not _has_test_pictures(data):
        return []
    return _read(data.eval or data.train, data.eval_split, data)


def _part(pictures: Sequence[Picture], share: float, *, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Return a share of pictures, and the others in their order."""
    drawn = _draw(pictures, max(1, round(share * len(pictures))), seed=seed)
    chosen = {id(picture) for picture in drawn}
    return drawn, [picture for picture in pictures if id(picture) not in chosen]


def _pictures(sources: Sequence[Source]) -> list[Picture]:
    return [picture for source in sources for picture in source.pictures]


def _classes(train: Sequence[Source], held_out: Sequence[Source], *, task: str | None) -> tuple[Label, ...]:
    """Return all classes in their order, and check that every picture is of one of them."""
    found = {picture.label for picture in _pictures(train)}
    if task is not None:
        expected: Sequence[Label] = range(find_task(task).classes)
        _check_known(train, expected, f"{task} has the classes 0 to {len(expected) - 1}")
    elif all(source.classes for source in train):
        expected = list(dict.fromkeys(name for source in train for name in source.classes or ()))
    else:
        expected = sorted(found, key=lambda label: (isinstance(label, str), label))
    if len(expected) < 2:
        raise EvaError(f"there is one class only, {expected[0]!r}: a classifier needs at least two to tell apart.")
    _check_known(held_out, expected, "the training pictures have no such class")
    return tuple(expected)


def _check_known(sources: Sequence[Source], classes: Sequence[Label], otherwise: str) -> None:
    known = set(classes)
    strange = next((picture for picture in _pictures(sources) if picture.label not in known), None)
    if strange is not None:
        hint = near_misses(str(strange.label), map(str, classes))
        raise EvaError(f"{strange.name} is of class {strange.label!r}{hint}, but {otherwise}; mend or remove it.")


def _draw(pictures: Sequence[Picture], limit: int | None, *, seed: int = _DRAW_SEED) -> list[Picture]:
    """Return so many pictures in a random order; the first n have the classes in their shares, for every n."""
    order = shuffled(pictures, seed)
    sizes = Counter(picture.label for picture in order)
    seen: Counter[Label] = Counter()
    places = []
    for picture in order:
        seen[picture.label] += 1
        places.append((seen[picture.label] - 0.5) / sizes[picture.label])
    return [order[index] for index in sorted(range(len(order)), key=places.__getitem__)][:limit]
