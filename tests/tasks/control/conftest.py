"""Episodes made of numbers, and one small data set of real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.on_device import TEST_DEVICE

from evatune.tasks.control.episodes import Episode
from evatune.tasks.control.model import DecisionTransformer, DecisionTransformerConfig


@pytest.fixture(scope="session")
def new_episode() -> Callable[..., Episode]:
    """A function that makes an episode of random numbers."""

    def build(*, steps: int = 12, seed: int = 0) -> Episode:
        chance = np.random.default_rng(seed)
        return Episode(
            environment="reach-v3",
            states=chance.standard_normal((steps, 39)).astype(np.float32),
            actions=chance.uniform(-1, 1, (steps, 4)).astype(np.float32),
            rewards=chance.uniform(0, 10, steps).astype(np.float32),
            seed=seed,
        )

    return build


@pytest.fixture(scope="session")
def new_model() -> Callable[..., DecisionTransformer]:
    """A function that makes a Decision Transformer of two layers with random weights, in evaluation mode."""

    def build(**options: object) -> DecisionTransformer:
        torch.manual_seed(0)
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context": 6}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = DecisionTransformerConfig(**{**sizes, **dropout, **options})
        return DecisionTransformer(config).to(TEST_DEVICE).eval()

    return build


@pytest.fixture(scope="session")
def reach_episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three episodes of `reach-v3`."""
    from evatune.tasks.control.collecting import collect_episodes

    folder = tmp_path_factory.mktemp("episodes")
    collect_episodes(["reach"], folder, episodes=3, noise=0.1, seed=0)
    return folder


@pytest.fixture(scope="session")
def needs_pictures() -> None:
    """Skip where MuJoCo can draw nothing: no OpenGL library, or `MUJOCO_GL=disable`."""
    environment = {"MUJOCO_GL": "egl", **os.environ} if sys.platform == "linux" else None  # as evatune chooses
    tried = subprocess.run([sys.executable, "-c", _DRAW], capture_output=True, text=True, env=environment)
    if tried.returncode:
        pytest.skip(f"MuJoCo cannot draw here: {tried.stderr.strip().splitlines()[-1]}")


_DRAW = """
import mujoco
mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco><worldbody/></mujoco>"), 8, 8).render()
"""
