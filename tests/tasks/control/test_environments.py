"""Meta-World's environments."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from evatune.errors import EvaError
from evatune.tasks.control.environments import EPISODE_STEPS, episode_seed, make_environment, picture, scripted_policy


def test_training_and_evaluation_never_share_a_seed() -> None:
    train = {episode_seed(seed, index, stream="train") for seed in range(3) for index in range(500)}
    held_out = {episode_seed(seed, index, stream="eval") for seed in range(3) for index in range(500)}
    assert len(train) == len(held_out) == 1500
    assert not train & held_out


def test_the_seed_decides_the_goal() -> None:
    environment = make_environment("push")
    first, other = environment.reset(seed=1)[0], environment.reset(seed=2)[0]
    assert first.shape == (39,)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(environment.reset(seed=1)[0], first)
    assert np.any(first[36:] != 0)  # the goal is observed
    assert np.any(first[36:] != other[36:])


def test_a_scripted_policy_succeeds_within_200_steps() -> None:
    environment, policy = make_environment("reach-v2"), scripted_policy("reach-v3")
    observation, info = environment.reset(seed=0)
    steps, ended, succeeded = 0, False, info["success"]
    while not ended:
        observation, reward, terminated, ended, info = environment.step(policy.get_action(observation))
        steps, succeeded = steps + 1, succeeded or info["success"]
        assert 0 <= reward <= 10
        assert not terminated
    assert (steps, succeeded) == (EPISODE_STEPS, True)


def test_without_metaworld_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(EvaError, match=r"needs the Python package metaworld; run: pip install 'evatune\[control\]'"):
        make_environment("reach")


_DRAW = """
from evatune.errors import EvaError
from evatune.tasks.control.environments import make_environment, picture
try:
    environment = make_environment("reach", render=True, size=64)
    environment.reset(seed=0)
    print("picture", picture(environment).shape)
    environment.close()
except EvaError as error:
    print("error", error)
"""


@pytest.mark.parametrize("backend", [None, "egl", "osmesa", "glfw", "disable", "nonsense"])
def test_drawing_works_or_says_why_in_one_sentence(backend: str | None) -> None:
    wanted = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY")}
    wanted |= {} if backend is None else {"MUJOCO_GL": backend}
    done = subprocess.run([sys.executable, "-c", _DRAW], env=wanted, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    assert lines[0] == "picture (64, 64, 3)" or ("MUJOCO_GL" in lines[0] and "; set MUJOCO_GL" in lines[0])
    if backend in ("disable", "nonsense"):
        assert lines[0].startswith("error")
    assert "Traceback" not in done.stderr


def test_pictures_show_the_robot(needs_pictures: None) -> None:
    environment = make_environment("reach", render=True, size=64)
    environment.reset(seed=0)
    shown = picture(environment)
    environment.close()
    red = (shown[..., 0] > 100) & (shown[..., 1] < 40) & (shown[..., 2] < 60)
    assert red[:32].sum() > red[32:].sum() / 4  # the red arm stands upright
