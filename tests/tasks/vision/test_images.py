"""Decoding every kind of picture, refusing bad ones, and the pixels that a model sees."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evatune.errors import EvaError
from evatune.tasks.vision import images
from evatune.tasks.vision.images import BadPicture, Preprocessing, check, decode
from evatune.tasks.vision.sources import Picture


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(value: int = 100, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("L", size, value)


@pytest.mark.parametrize(
    ("content", "pixel", "note"),
    [
        (encoded(Image.new("RGB", (6, 4), (1, 2, 3))), (1, 2, 3), None),
        (encoded(Image.new("RGB", (6, 4), (9, 9, 9)).quantize(4)), (9, 9, 9), None),
        (encoded(grey()), (100, 100, 100), "one channel"),
        (encoded(grey().convert("1")), (0, 0, 0), "one channel"),
        (encoded(Image.fromarray(np.full((4, 6), 257 * 200, np.uint16))), (200, 200, 200), "16 bits"),
        (encoded(Image.new("RGBA", (6, 4), (255, 0, 0, 0))), (255, 255, 255), "transparency"),
        (encoded(Image.new("RGBA", (6, 4), (255, 0, 0, 51))), (255, 204, 204), "transparency"),
        (encoded(Image.new("CMYK", (6, 4), (0, 0, 0, 0)), "TIFF"), (255, 255, 255), "CMYK"),
        (np.full((4, 6), 7, np.uint8), (7, 7, 7), "one channel"),
        (np.full((4, 6, 1), 7, np.uint8), (7, 7, 7), "one channel"),
        (np.full((4, 6, 3), 7, np.uint8), (7, 7, 7), None),
    ],
)
def test_every_kind_becomes_red_green_and_blue(content, pixel, note):
    image, found = decode(content)
    assert (image.mode, image.size, found) == ("RGB", (6, 4), note)
    assert image.getpixel((5, 3)) == pixel


def test_photographs_are_turned_as_the_camera_says():
    image = Image.new("RGB", (6, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # turn by a quarter
    assert decode(encoded(image, "JPEG", exif=exif))[0].size == (4, 6)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no picture at all", "is no picture"),
        (b"", "is no picture"),
        (encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:-400], "cannot be decoded: .*truncated"),
        (encoded(Image.effect_noise((64, 64), 50))[:-300], "cannot be decoded"),
        (Path("nowhere.png"), "is not there"),
    ],
)
def test_bad_pictures_have_a_reason(content, reason):
    with pytest.raises(BadPicture, match=reason):
        decode(content)


def test_huge_pictures_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 23)
    with pytest.raises(BadPicture, match="is 6 x 4 pixels, more than 23 in all"):
        decode(encoded(grey()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # Pillow's own refusal, which comes first
    with pytest.raises(BadPicture, match="has more than 46 pixels"):
        decode(encoded(grey()))


def pictures(*contents: object) -> list[Picture]:
    return [
        Picture(name=f"picture {number}", label=0, read=partial(lambda content: content, content))
        for number, content in enumerate(contents)
    ]


def test_check_names_and_counts_bad_pictures():
    some = pictures(encoded(grey()), b"x", encoded(grey()), *[b"y"] * 6)
    with pytest.raises(
        EvaError, match=r"^7 of 9 pictures cannot be used: picture 1 is no picture; .*; and 2 more\. Mend"
    ):
        check(some, Preprocessing(size=8), progress=False)
    checked = check(some, Preprocessing(size=8), skip=True, progress=False)
    assert [picture.name for picture in checked.pictures] == ["picture 0", "picture 2"]
    assert len(checked.skipped) == 7
    assert checked.skipped["picture 1"] == "is no picture"
    assert checked.converted == {"one channel": ["picture 0", "picture 2"]}
    assert checked.pixels.shape == (2, 8, 8, 3)


def test_pictures_of_the_other_part_are_named_too():
    some, others = pictures(b"x", encoded(grey())), pictures(encoded(grey()), b"x", b"y")[1:]
    with pytest.raises(EvaError, match=r"3 of 4 pictures cannot be used: picture 0 is no .*; picture 1 .*; picture 2 "):
        check(some, Preprocessing(size=8), others=others, progress=False)
    assert len(check(some, Preprocessing(size=8), skip=True, others=others, progress=False).pictures) == 1


def test_skipping_all_is_an_error_too():
    with pytest.raises(EvaError, match="1 of 1 pictures cannot be used"):
        check(pictures(b"x"), Preprocessing(size=8), skip=True, progress=False)


def test_what_does_not_fit_into_memory_is_not_kept(monkeypatch):
    monkeypatch.setattr(images, "CACHE_BYTES", 2 * 8 * 8 * 3 - 1)
    checked = check(pictures(encoded(grey()), encoded(grey())), Preprocessing(size=8), progress=False)
    assert checked.pixels is None
    assert len(checked.pictures) == 2


def test_crop_keeps_proportions_and_stretch_does_not():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200  # the middle third
    image = Image.fromarray(pixels)
    assert (Preprocessing(size=10, fit="crop").resize(image) == 200).all()
    assert (Preprocessing(size=10).resize(image)[:, [0, 9]] == 0).all()


@pytest.mark.on_cpu("pictures are made there, and sent to the device afterwards")
def test_normalize_and_restore():
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 8, 8, 3), generator=chance, dtype=torch.uint8)
    steps = Preprocessing(size=8)
    normalized = steps.normalize(pixels)
    assert normalized.shape == (2, 3, 8, 8)
    expected = (pixels[1, 3, 4, 2].double() / 255 - 0.406) / 0.225
    assert normalized[1, 2, 3, 4] == pytest.approx(float(expected), rel=1e-6)
    assert np.array_equal(steps.restore(normalized), pixels.numpy())


@pytest.mark.parametrize("fit", ["stretch", "crop"])
@pytest.mark.on_cpu("pictures are made there, and sent to the device afterwards")
def test_transformers_makes_the_same_pixels_of_what_is_saved(tmp_path, fit):
    from transformers import AutoImageProcessor

    steps = Preprocessing(size=16, fit=fit)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(steps.to_json()))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = torch.as_tensor(np.array(processor(image)["pixel_values"]))
    ours = steps.normalize(torch.from_numpy(steps.resize(image).copy())[None])
    assert (ours - theirs).abs().max() < 1e-5
