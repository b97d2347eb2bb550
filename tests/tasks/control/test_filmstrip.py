"""What a filmstrip shows; the pictures are made up, since not every machine can draw."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evatune.cli.main import main
from evatune.tasks.control import preview
from evatune.tasks.control.episodes import Episode
from evatune.tasks.control.filmstrip import Strip, sheet


def test_strips_stand_below_each_other_under_their_titles() -> None:
    red = np.full((40, 50, 3), (255, 0, 0), np.uint8)
    strips = [Strip(title=f"episode {n}", pictures=[red] * n, captions=["step 0"] * n) for n in (1, 3)]
    with Image.open(io.BytesIO(sheet(strips))) as page:
        pixels = np.asarray(page)
    assert pixels.shape[1] == 3 * 50 + 4 * 4  # the longest strip and the gaps
    is_red = (pixels == (255, 0, 0)).all(-1)
    assert 0.9 * 4 < is_red.sum() / (40 * 50) <= 4  # four pictures, less their captions
    assert (pixels[:24] == 0).all(-1).any()  # the first title


def test_an_episode_is_drawn_once(new_episode: Callable[..., Episode], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def frames(name: str, *, seed: int, actions: np.ndarray, steps: list[int]) -> list[np.ndarray]:
        asked.append(seed)
        return [np.zeros((8, 10, 3), np.uint8)] * len(steps)

    monkeypatch.setattr(preview, "frames", frames)
    first, second = new_episode(seed=0), new_episode(seed=1)
    window: dict[str, Any] = dict.fromkeys(("states", "actions"), np.zeros((2, 4)))
    window |= dict.fromkeys(("rewards", "returns_to_go", "timesteps"), np.zeros(2))
    shown = preview.preview([(first, window), (second, window), (first, window)])
    assert asked == [0, 1] and shown.picture is not None
    assert len(shown.content) == 3


def test_why_there_are_no_pictures_is_told(
    new_episode: Callable[..., Episode], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    episode = new_episode()
    rows = {"observations": episode.states, "actions": episode.actions, "rewards": episode.rewards}
    np.savez(tmp_path / "hammer-v2.npz", **rows, dones=np.arange(len(episode)) == len(episode) - 1)  # type: ignore[arg-type]
    data = ["--data", str(tmp_path / "hammer-v2.npz"), "--context", "4", "--save", str(tmp_path / "strip.png")]
    assert main(["preview", "--task", "control", "--model", "new:1x2x16", *data]) == 1
    assert (
        "the episodes of hammer-v3 do not say which seed they began with; leave out --save." in capsys.readouterr().err
    )
    assert not (tmp_path / "strip.png").exists()
