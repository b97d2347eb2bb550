"""From a file or an array to the pixels that a model sees.

Shapes: H and W are height and width of a picture as it came, S the side of the model's input.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from evatune.errors import EvaError
from evatune.tasks.vision.sources import Content, Picture

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's red, green and blue, of values between 0 and 1."""
MAX_PIXELS = 89_478_485
"""Larger pictures are refused: 256 MiB once decoded, Pillow's own bound for what may be a decompression bomb."""
CACHE_BYTES = 2**30
"""Resized pictures stay in memory up to this size (7,100 of 224 px); more are decoded each time they are seen."""
_NAMED = 5
"""Bad pictures that an error names; the rest is counted."""


class BadPicture(Exception):  # noqa: N818 - the reason alone; `check` makes errors of many
    """Why one picture cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes pixels: resized with bicubic interpolation, then normalized."""

    size: int
    """Side S of the square that the model sees, in pixels."""
    fit: Literal["stretch", "crop"] = "stretch"
    """`stretch` changes the proportions; `crop` keeps them and cuts the longer side at both ends."""
    mean: tuple[float, ...] = IMAGENET[0]
    """Subtracted from red, green and blue."""
    std: tuple[float, ...] = IMAGENET[1]
    """Divides red, green and blue."""

    def resize(self, image: Image.Image) -> np.ndarray:
        """Return a picture as (S, S, 3) bytes."""
        if self.fit == "stretch":
            return np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        width, height = (self.size * length // min(image.size) for length in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        scaled = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(scaled.crop((left, top, left + self.size, top + self.size)))

    def normalize(self, pixels_bshc: Tensor) -> Tensor:
        """Return bytes (B, S, S, 3) as floats (B, 3, S, S), as models take them."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return ((pixels_bshc.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    def restore(self, pixels_bchw: Tensor) -> np.ndarray:
        """Undo `normalize`: return bytes (B, S, S, 3), for display."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return ((pixels_bchw.permute(0, 2, 3, 1) * std + mean) * 255).round().clamp(0, 255).byte().numpy()

    def to_json(self) -> dict[str, Any]:
        """Return the content of a `preprocessor_config.json` that transformers' image processors read."""
        side = {"height": self.size, "width": self.size}
        content: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": side,
            "resample": int(Image.Resampling.BICUBIC),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.fit == "crop":
            content |= {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": self.size}}
            content |= {"do_center_crop": True, "crop_size": side}
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Preprocessing:
        """Restore what `to_json` returned."""
        fit: Literal["stretch", "crop"] = "crop" if content.get("do_center_crop") else "stretch"
        side = content["crop_size" if fit == "crop" else "size"]["height"]
        return cls(size=side, fit=fit, mean=tuple(content["image_mean"]), std=tuple(content["image_std"]))


def decode(content: Content) -> tuple[Image.Image, str | None]:
    """Return a picture in red, green and blue, upright, and the list of conversions.

    One channel is repeated three times, 16 bits become 8, transparency is laid on white, the first frame of several is
    taken, and a photograph is turned as its camera says.

    Args:
        content: a file, an encoded picture, or pixels.

    Returns:
        The picture, and a phrase such as "one channel", or None where nothing had to be done.

    Raises:
        BadPicture: it cannot be decoded, is cut short, or is larger than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and of unknown tags
            image = _opened(content)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadPicture(f"is {width} x {height} pixels, more than {MAX_PIXELS:,} in all")
            image = ImageOps.exif_transpose(image)  # a copy, so everything is decoded here
    except BadPicture:
        raise
    except Image.DecompressionBombError:
        raise BadPicture(f"has more than {2 * MAX_PIXELS:,} pixels") from None
    except FileNotFoundError:
        raise BadPicture("is not there") from None
    except Exception as error:  # a damaged file fails in any way: OSError, SyntaxError, struct.error, ...
        reason = "is no picture" if isinstance(error, Image.UnidentifiedImageError) else str(error) or repr(error)
        raise BadPicture(reason if reason.startswith("is ") else f"cannot be decoded: {reason}") from None
    return _to_rgb(image)


def _opened(content: Content) -> Image.Image:
    if isinstance(content, np.ndarray):
        return Image.fromarray(content.squeeze())
    return Image.open(content if isinstance(content, Path) else io.BytesIO(content))


def _to_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a pixel, of which 16 are used
        high = np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255).round().astype(np.uint8)
        return Image.fromarray(high).convert("RGB"), "16 bits"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB"), "transparency"
    if image.mode in ("1", "L"):
        return image.convert("RGB"), "one channel"
    return image.convert("RGB"), None if image.mode in ("RGB", "P") else image.mode


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Pictures that can all be decoded."""

    pictures: tuple[Picture, ...]
    """The good ones, in their order."""
    pixels: Tensor | None
    """All of them resized, (n, S, S, 3) bytes; None if that is more than `CACHE_BYTES`."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Names of the bad ones, and why."""
    converted: dict[str, list[str]] = field(default_factory=dict)
    """Names of those that had one channel, 16 bits, transparency, ..."""


def check(
    pictures: Sequence[Picture],
    preprocessing: Preprocessing,
    *,
    skip: bool = False,
    others: Sequence[Picture] = (),
    progress: bool = True,
) -> Checked:
    """Decode every picture once, so that a bad one is reported before any long work.

    Args:
        pictures: the pictures.
        preprocessing: how they are resized.
        skip: leave bad pictures out instead of refusing.
        others: pictures that an error names as well, so that all bad ones are mended at once.
        progress: show a bar on a terminal.

    Raises:
        EvaError: some cannot be used and `skip` is false, or none can.

    Cost: one pass over the pictures, in as many threads as PyTorch uses.
    """
    size = preprocessing.size
    keep = len(pictures) * size * size * 3 <= CACHE_BYTES

    def read(picture: Picture) -> tuple[np.ndarray | None, str | None]:
        image, note = decode(picture.read())
        return (preprocessing.resize(image) if keep else None), note

    good: list[Picture] = []
    pixels: list[np.ndarray] = []
    bad: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    for picture, seen, reason in _each_read(read, pictures, progress=progress):
        if seen is None:
            bad[picture.name] = str(reason)
            continue
        good.append(picture)
        if seen[0] is not None:
            pixels.append(seen[0])
        if seen[1] is not None:
            converted.setdefault(seen[1], []).append(picture.name)
    if bad and (not skip or not good):
        keep = False
        also = _each_read(read, others, progress=progress)
        bad |= {picture.name: reason for picture, _, reason in also if reason is not None}
        named = "; ".join(f"{name} {reason}" for name, reason in list(bad.items())[:_NAMED])
        rest = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise EvaError(
            f"{len(bad)} of {len(pictures) + len(others)} pictures cannot be used: {named}{rest}. Mend or remove "
            "them, or leave them out with bad_images: skip."
        )
    return Checked(
        pictures=tuple(good),
        pixels=torch.from_numpy(np.stack(pixels)) if pixels else None,
        skipped=bad,
        converted=converted,
    )


def _each_read(
    read: Callable[[Picture], Any], pictures: Sequence[Picture], *, progress: bool
) -> Iterator[tuple[Picture, Any, str | None]]:
    """Yield each picture with what `read` returns of it, or with why it cannot be used."""

    def either(picture: Picture) -> tuple[Picture, Any, str | None]:
        try:
            return picture, read(picture), None
        except BadPicture as reason:
            return picture, None, str(reason)

    hidden = None if progress else True
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        results = pool.map(either, pictures)
        yield from tqdm(results, total=len(pictures), desc="pictures", leave=False, disable=hidden)
