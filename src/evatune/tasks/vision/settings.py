"""The `data:` section of a vision recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evatune.settings import number
from evatune.tasks.settings import DataSettings, path_setting


@dataclass(frozen=True, kw_only=True)
class VisionData(DataSettings):
    """Pictures and their classes."""

    train: tuple[str, ...] = path_setting(())
    """A folder with a folder for each class, tables or lists of pictures, a hub id, `vtab:NAME`; several are mixed."""
    eval: tuple[str, ...] = path_setting(())
    """The same for the held-out pictures; by default the source's own test split, else a share of `train`."""
    max_train_examples: int | None = number(None, low=1)
    """Keep this many training pictures, the same for every seed; classes keep their shares."""
    max_eval_examples: int | None = number(None, low=1)
    """Keep this many held-out pictures, the same for every seed."""
    held_out: float = number(0.2, above=0, high=0.9)
    """Share of the training pictures that is held out if there are no test pictures, or with `validate`."""
    validate: bool = False
    """Score on a share of the training pictures, since a search must not use those that are reported."""
    vtab_folder: str | None = path_setting(None)
    """Copy of VTAB-1K on disk for `vtab:NAME`; without it, 1,000 pictures are drawn from the hub."""
    image_size: int = number(224, low=8, high=4096)
    """Side of the square that the model sees, in pixels."""
    fit: Literal["stretch", "crop"] = "stretch"
    """How a picture becomes a square: stretched, or cut at both ends of its longer side."""
    normalization: Literal["auto", "imagenet"] = "auto"
    """Mean and deviation of the colours: the model's own if its folder has them, else ImageNet's."""
    image_column: str | None = None
    """Column of the pictures in a table; by default one with a usual name."""
    label_column: str | None = None
    """Column of the labels; by default one with a usual name."""
    bad_images: Literal["refuse", "skip"] = "refuse"
    """What to do with pictures that cannot be decoded; those that are skipped are counted and named."""
    measure_tokens: Literal["all", "patch", "class", "register"] = "all"
    """Tokens whose activations EVA measures."""
