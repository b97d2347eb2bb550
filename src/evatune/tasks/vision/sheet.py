"""A contact sheet: pictures exactly as the model sees them, each with its class."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_TILE, _LINE, _GAP = 160, 22, 8


def contact_sheet(pixels_bshc: np.ndarray, captions: Sequence[str], *, columns: int = 8) -> bytes:
    """Return a PNG file.

    Args:
        pixels_bshc: pictures as bytes, (B, S, S, 3).
        captions: one a picture; what is too wide is cut.
        columns: pictures in a row.
    """
    columns = min(columns, max(len(captions), 1))
    width, height = _TILE + _GAP, _TILE + _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, math.ceil(len(captions) / columns) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, (pixels, caption) in enumerate(zip(pixels_bshc, captions, strict=True)):
        left, top = _GAP + index % columns * width, _GAP + index // columns * height
        tile = Image.fromarray(pixels)
        # Small pictures are enlarged without smoothing, so that the model's own pixels show.
        enlarged = Image.Resampling.NEAREST if tile.width < _TILE else Image.Resampling.BICUBIC
        sheet.paste(tile.resize((_TILE, _TILE), enlarged), (left, top))
        while draw.textlength(caption, font) > _TILE:
            caption = caption[:-2].rstrip("…") + "…"
        draw.text((left, top + _TILE + 2), caption, fill="black", font=font)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
