"""A tiny encoder, texts whose class stands in them, and recipes of both."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from evatune.models import load_tokenizer
from evatune.recipe import Recipe
from evatune.tasks import open_task
from evatune.tasks.settings import ModelSettings
from evatune.tasks.understanding.settings import UnderstandingData
from evatune.tasks.understanding.task import Understanding


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a BERT of two layers without head, and the tokenizer of the tiny model."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = load_tokenizer(tiny_model)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        initializer_range=0.2,  # large enough that classes can be told apart at once
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_texts(path: Path, *, count: int, seed: int) -> Path:
    """Write texts whose class stands in them."""
    chance = random.Random(seed)
    lines = []
    for _ in range(count):
        label = chance.choice(["good", "bad"])
        words = chance.choices(["red", "green", "blue", "one", "two"], k=chance.randint(1, 6))
        lines.append(json.dumps({"sentence": " ".join([*words, label, label, label]), "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "train.jsonl", count=96, seed=1)
    write_texts(folder / "test.jsonl", count=40, seed=2)
    return folder


@pytest.fixture
def recipe(encoder: Path, texts: Path, tmp_path: Path):
    def build(name: str = "run", **sections) -> Recipe:
        content = {
            "task": "understanding",
            "model": {"name": str(encoder)},
            "data": {"train": [str(texts / "train.jsonl")], "eval": [str(texts / "test.jsonl")]},
            "adapter": {"rank": 4, "lora_alpha": 16},
            "measure": {"max_batches": 3, "batch_size": 16},
            "train": {"steps": 24, "batch_size": 16, "precision": "fp32", "learning_rate": 1e-2},
            "output": str(tmp_path / name),
        }
        for section, values in sections.items():
            content[section] = content[section] | values
        return Recipe.from_dict(content)

    return build


@pytest.fixture
def opened(encoder: Path) -> Callable[..., Understanding]:
    """Return a function that opens the task with the fields of its `data:` section."""

    def open_with(model: Path = encoder, **data) -> Understanding:
        return open_task("understanding", UnderstandingData(**data), model=ModelSettings(name=str(model)), seed=0)

    return open_with


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes rows as JSON lines and returns the file's name."""

    def write(name: str, *rows: dict) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write
