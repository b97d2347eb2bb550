"""Meta-World's environments: seeded goal positions, scripted policies and pictures.

An observation is 39 numbers: position of the hand, opening of the gripper and poses of two objects, the same of the
step before, and the goal. An action is 4 numbers in [-1, 1]: the movement of the hand and the force of the gripper.
Every episode lasts 200 steps (Appendix E.1 of the paper); it succeeds if the environment reports success in one of
them.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from evatune.errors import EvaError
from evatune.tasks.control.names import environment_names

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.envs.registration import EnvSpec

STATE_SIZE, ACTION_SIZE, EPISODE_STEPS = 39, 4, 200

# Seeds of training episodes and of evaluation come from separate streams, so that no goal position is in both.
_STREAMS = {"train": 0, "eval": 1}


def episode_seed(seed: int, index: int, *, stream: str) -> int:
    """Return the seed of one episode's goal position.

    Args:
        seed: seed of the data set or of the evaluation.
        index: number of the episode.
        stream: `train` or `eval`; the two never share a seed.
    """
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint32)[0]
    return int(state >> 1) * 2 + _STREAMS[stream]


def make_environment(name: str, *, render: bool = False, size: int = 240) -> gymnasium.Env:
    """Return one environment, whose `reset(seed=...)` chooses the goal and object positions.

    Args:
        name: for example `hammer-v3`.
        render: let `render()` return pictures.
        size: height and width of a picture in pixels.

    Raises:
        EvaError: there is no such environment, Meta-World cannot be imported, or nothing can be drawn here.
    """
    (name,) = environment_names([name])
    metaworld = _metaworld()
    options: dict[str, Any] = {}
    if render:
        if os.environ.get("MUJOCO_GL", "").lower() in ("disable", "disabled", "off", "false", "0"):
            raise EvaError("MUJOCO_GL=disable forbids drawing; set MUJOCO_GL to egl or osmesa, whichever is installed.")
        options = {"render_mode": "rgb_array", "camera_name": "corner2", "width": size, "height": size}
    with quiet():
        inner = metaworld.ALL_V3_ENVIRONMENTS[name](**options)
    # Meta-World's own way to a goal is a pickled task; these are the attributes that it sets.
    inner._partially_observable = False
    inner.__dict__.pop("sawyer_observation_space", None)
    inner._freeze_rand_vec, inner.seeded_rand_vec, inner._set_task_called = False, True, True
    return _wrapped(inner, name)


def environment_spec(name: str) -> EnvSpec:
    """Return how Gymnasium makes an environment, for data sets that say so themselves."""
    from gymnasium.envs.registration import EnvSpec

    return EnvSpec(f"evatune/{name}", entry_point=f"{__name__}:make_environment", kwargs={"name": name})


def scripted_policy(name: str) -> Any:
    """Return Meta-World's scripted policy for one episode; `get_action(observation)` returns 4 numbers."""
    _metaworld()
    from metaworld.policies import ENV_POLICY_MAP

    policies: Any = ENV_POLICY_MAP
    return policies[name]()


def picture(environment: gymnasium.Env) -> np.ndarray:
    """Return what a camera sees now: (height, width, 3), uint8.

    Raises:
        EvaError: nothing can be drawn on this machine.
    """
    try:
        with quiet():
            return np.asarray(environment.render())[::-1]  # the camera `corner2` is upside down
    except Exception as error:  # each backend of OpenGL fails with errors of its own
        raise EvaError(
            f"cannot draw the environment with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} "
            f"({_first_line(error)}); set MUJOCO_GL to egl or osmesa, whichever is installed."
        ) from None


def _metaworld() -> Any:
    """Import Meta-World; on a Linux machine without a screen, pictures are drawn by EGL if it is there."""
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not screen and "mujoco" not in sys.modules and ctypes.util.find_library("EGL"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        with quiet():
            import metaworld
    except ModuleNotFoundError as error:
        raise EvaError(
            f"decision making needs the Python package {error.name}; run: pip install 'evatune[control]'."
        ) from None
    except Exception as error:  # MuJoCo imports the backend that MUJOCO_GL names, which may fail in any way
        raise EvaError(
            f"MuJoCo cannot be imported with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({_first_line(error)}); "
            "set MUJOCO_GL=disable to work without pictures."
        ) from None
    return metaworld


def _wrapped(inner: Any, name: str) -> gymnasium.Env:
    import gymnasium

    class MetaWorld(gymnasium.Wrapper):
        """Seeds by `reset(seed=...)`, ends after 200 steps, and returns float32 and little else."""

        environment_name = name

        def __init__(self) -> None:
            super().__init__(inner)
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (STATE_SIZE,), np.float32)
            self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            if seed is not None:
                inner.seed(seed)
            self._steps = 0
            observation, _ = inner.reset()
            return observation.astype(np.float32), {"success": False}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            observation, reward, _, _, info = inner.step(np.clip(action, -1, 1).astype(np.float32))
            self._steps += 1
            ended = self._steps == EPISODE_STEPS
            return observation.astype(np.float32), float(reward), False, ended, {"success": info["success"] > 0}

    return MetaWorld()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of Meta-World and Gymnasium, which are for their own developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")
