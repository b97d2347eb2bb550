"""Tiny pictures on disk in two classes that colour tells apart, and a tiny DINOv2, as a user would have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

COLOURS = {"blue": (20, 40, 200), "red": (200, 30, 20)}


def write_pictures(folder: Path, *, count: int, seed: int, size: int = 20) -> Path:
    """Write a folder with a folder of noisy pictures for each class."""
    chance = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = chance.integers(-20, 20, (size, size, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 20 pictures in each of two class folders; do not change it."""
    return write_pictures(tmp_path_factory.mktemp("photos") / "photos", count=20, seed=0)


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DINOv2 of two layers, four registers and random weights."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    folder = tmp_path_factory.mktemp("tiny-dinov2")
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    return folder
