"""A small recipe for whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evatune.recipe import Recipe


@pytest.fixture
def recipe(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    """Return a function that builds a small recipe; settings are given as `section={...}`."""

    def build(name: str = "run", **sections: dict[str, Any]) -> Recipe:
        content: dict[str, Any] = {
            "model": {"name": str(tiny_model)},
            "data": {"train": [str(tiny_data / "train.jsonl")], "eval": [str(tiny_data / "test.jsonl")]},
            "adapter": {"rank": 4},
            "measure": {"max_batches": 3},
            "train": {"steps": 6, "batch_size": 4, "precision": "fp32", "logging_steps": 2, "learning_rate": 5e-3},
            "output": str(tmp_path / name),
        }
        for section, values in sections.items():
            content[section] = content[section] | values
        return Recipe.from_dict(content)

    return build
