"""Pictures of episodes: the actions are played once more in an environment that draws."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evatune.files import write_bytes
from evatune.tasks.control.environments import make_environment, picture, quiet

VIDEO_STEPS, VIDEO_MILLISECONDS = 4, 80
"""A video shows every fourth step, for this long. Without a graphics card a picture takes some 0.2 s."""


def frames(name: str, *, seed: int, actions: np.ndarray, steps: Sequence[int], size: int = 160) -> list[np.ndarray]:
    """Return pictures of an episode.

    Args:
        name: the environment.
        seed: of the goal position.
        actions: (T, 4), what was done; the physics are deterministic, so the same happens again.
        steps: numbers of the steps before which a picture is taken, ascending.
        size: height and width of a picture in pixels.

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
                    taken.append(picture(environment))
                environment.step(actions[step])
        return taken
    finally:
        environment.close()


def sheet(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> bytes:
    """Return rows of pictures under their titles as a PNG file."""
    from PIL import Image, ImageDraw

    height, width = rows[0][0].shape[:2]
    line = 18
    page = Image.new("RGB", (width * max(map(len, rows)), (height + line) * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for index, (row, title) in enumerate(zip(rows, titles, strict=True)):
        top = index * (height + line)
        draw.text((4, top + 3), title, fill="black")
        for column, frame in enumerate(row):
            page.paste(Image.fromarray(frame), (column * width, top + line))
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
