"""Pictures of episodes: the actions are played once more in an environment that draws."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evatune.files import write_bytes
from evatune.tasks.control.environments import make_environment, picture, quiet

VIDEO_STEPS, VIDEO_MILLISECONDS = 4, 80
"""A video shows every fourth step, for this long. Without a graphics card a picture takes some 0.2 s."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Pictures of one episode in a row."""

    title: str
    """What stands above them."""
    pictures: Sequence[np.ndarray]
    """(height, width, 3), all of one size."""
    captions: Sequence[str]
    """What stands in each."""


def frames(name: str, *, seed: int, actions: np.ndarray, steps: Sequence[int], size: int = 200) -> list[np.ndarray]:
    """Return pictures of an episode.

    Args:
        name: the environment.
        seed: of the goal position.
        actions: (T, 4), what was done; the physics are deterministic, so the same happens again.
        steps: numbers of the steps before which a picture is taken, ascending.
        size: width of a picture in pixels; the height is four fifths of it, without the empty part above the robot.

    Raises:
        EvaError: nothing can be drawn on this machine.
    """
    environment = make_environment(name, render=True, size=size)
    try:
        taken = []
        with quiet():
            environment.reset(seed=seed)
            for step in range(max(steps) + 1):
                if step in steps:
                    taken.append(picture(environment)[size // 5 :])
                environment.step(actions[step])
        return taken
    finally:
        environment.close()


def sheet(strips: Sequence[Strip]) -> bytes:
    """Return strips under their titles as a PNG file."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = strips[0].pictures[0].shape[:2]
    line, gap = 24, 4
    columns = max(len(strip.pictures) for strip in strips)
    page = Image.new("RGB", (columns * (width + gap) + gap, len(strips) * (height + line) + gap), "white")
    draw, title_font, font = ImageDraw.Draw(page), ImageFont.load_default(15), ImageFont.load_default(12)
    for index, strip in enumerate(strips):
        top = index * (height + line)
        draw.text((gap, top + 3), strip.title, fill="black", font=title_font)
        for column, (pixels, caption) in enumerate(zip(strip.pictures, strip.captions, strict=True)):
            left = gap + column * (width + gap)
            page.paste(Image.fromarray(pixels), (left, top + line))
            draw.text((left + 6, top + line + 4), caption, fill="white", font=font)
    content = io.BytesIO()
    page.save(content, "PNG")
    return content.getvalue()


def write_video(path: Path, name: str, *, seed: int, actions: np.ndarray) -> Path:
    """Write an episode as an animated GIF.

    Raises:
        EvaError: nothing can be drawn on this machine, or the file cannot be written.
    """
    from PIL import Image

    images = [
        Image.fromarray(frame)
        for frame in frames(name, seed=seed, actions=actions, steps=range(0, len(actions), VIDEO_STEPS))
    ]
    content = io.BytesIO()
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=VIDEO_MILLISECONDS, loop=0)
    return write_bytes(path, content.getvalue())
