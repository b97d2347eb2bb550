"""Windows of episodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from evatune.tasks.control.episodes import Episode
from evatune.tasks.control.windows import Windows, padded, state_statistics


@pytest.fixture
def episodes(new_episode: Callable[..., Episode]) -> list[Episode]:
    """An episode of nine steps and one of four."""
    return [new_episode(steps=9, seed=1), new_episode(steps=4, seed=2)]


def test_every_step_ends_one_window(episodes: list[Episode]) -> None:
    windows = Windows(episodes, context=3, seed=0)
    ends = {(id(windows.episode(index)), int(windows[index]["timesteps"][-1])) for index in range(len(windows))}
    assert ends == {(id(one), step) for one in episodes for step in range(len(one))}
    assert len(windows) == 13


def test_a_window_holds_the_steps_before_its_end(episodes: list[Episode]) -> None:
    windows = Windows(episodes, context=3, seed=0)
    for index in range(len(windows)):
        row, one = windows[index], windows.episode(index)
        last = int(row["timesteps"][-1])
        first = max(0, last - 2)
        np.testing.assert_array_equal(row["timesteps"], np.arange(first, last + 1))
        np.testing.assert_array_equal(row["states"], one.states[first : last + 1])
        np.testing.assert_array_equal(row["actions"], one.actions[first : last + 1])
        for step, to_go in zip(row["timesteps"], row["returns_to_go"], strict=True):
            np.testing.assert_allclose(to_go, one.rewards[step:].astype(np.float64).sum(), rtol=1e-5)


def test_the_order_depends_on_the_seed_alone(episodes: list[Episode]) -> None:
    def order(seed: int) -> list[int]:
        windows = Windows(episodes, context=3, seed=seed)
        return [int(windows[index]["timesteps"][-1]) for index in range(len(windows))]

    assert order(0) == order(0) != order(1)


def test_padding_stands_behind_and_is_masked(episodes: list[Episode]) -> None:
    windows = Windows(episodes[1:], context=3, seed=0)
    rows = [windows[index] for index in range(len(windows))]
    batch = padded(rows, context=3)
    assert batch["states"].shape == (4, 3, 39)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["rewards"]) for row in rows]
    for number, row in enumerate(rows):
        n = len(row["rewards"])
        assert batch["attention_mask"][number].tolist() == [1] * n + [0] * (3 - n)
        torch.testing.assert_close(batch["states"][number, :n], torch.from_numpy(row["states"]))
        assert not batch["states"][number, n:].any()
    assert all(batch[name].dtype == torch.float32 for name in ("states", "actions", "rewards", "returns_to_go"))


def test_statistics_have_a_floor(new_episode: Callable[..., Episode]) -> None:
    still = new_episode(steps=50)
    still.states[:, 5] = 2.0
    mean, scale = state_statistics([still], floor=0.1)
    states = still.states.astype(np.float64)
    np.testing.assert_allclose(mean.numpy(), states.mean(0), atol=1e-6)
    assert scale[5] == np.float32(0.1)
    np.testing.assert_allclose(scale[:5].numpy(), states.std(0)[:5], rtol=1e-5)
