"""Training examples in files (`data.streaming`): the same run as with all of them in memory."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch

from evatune.recipe import load_recipe
from evatune.tasks.disk_list import DiskList
from evatune.tasks.generation import encoding
from evatune.tasks.task import batches
from evatune.training import finetune
from evatune.training.setup import open_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "cache"))


def recipe_of(model, data, **overrides):
    settings = {"model": str(model), "data": str(data / "train.jsonl"), "precision": "fp32", "max_length": 128}
    return load_recipe(None, settings | overrides)


def opened(model, data, **overrides):
    return open_recipe(recipe_of(model, data, **overrides))


@pytest.mark.parametrize(
    "overrides", [{}, {"packing": True}, {"max_train_examples": 7}, {"validate": True}, {"max_length": 24}]
)
def test_batches_and_counts_are_the_same(overrides, tiny_model, tiny_data):
    whole, streamed = (opened(tiny_model, tiny_data, streaming=on, **overrides) for on in (False, True))
    assert isinstance(streamed.train.rows, DiskList) and isinstance(streamed.examples.items, DiskList)
    assert not isinstance(whole.train.rows, DiskList) and not isinstance(whole.examples.items, DiskList)
    pairs = list(zip(*(batches(task, batch_size=4, seed=3) for task in (whole, streamed)), strict=True))
    assert pairs
    for one, other in pairs:
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (whole.summary(), whole.facts()) == (streamed.summary(), streamed.facts())
    assert whole.preview(3) == streamed.preview(3)
    assert list(whole.held_out) == list(streamed.held_out)
    if "packing" not in overrides:
        assert whole.kinds() == streamed.kinds()


@pytest.mark.parametrize("packing", [False, True])
def test_memory_does_not_grow_with_the_data(packing, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_AT_A_TIME", 10)

    def peak(n_rows: int, *, streaming: bool) -> int:
        with (tmp_path / "train.jsonl").open("w") as file:
            for number in range(n_rows):
                file.write(json.dumps({"text": f"{number:03} is a number; " * 25}) + "\n")
        task = opened(tiny_model, tmp_path, streaming=streaming, packing=packing, max_length=512)
        assert task.tokenizer
        tracemalloc.start()
        assert sum(len(row["input_ids"]) for row in task.train) > 1000
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    streamed, whole = (peak(300, streaming=on) - peak(100, streaming=on) for on in (True, False))
    assert streamed < 200 * 300  # bytes: places of rows, not their tokens
    assert whole > 20 * streamed


@pytest.mark.parametrize("further", [{}, {"bucketing": True}])
def test_a_run_and_its_resumption_are_the_same(further, tiny_model, tiny_data, tmp_path):
    shared = {"save_steps": 3, "train.batch_size": 4, "rank": 2, "max_batches": 2, "logging_steps": 1}
    shared |= {"schedule": "constant", "warmup_ratio": 0.0} | further

    def losses(name: str, *, steps: int, streaming: bool = True, resume: bool = False) -> list[float]:
        settings = shared | {"output": str(tmp_path / name), "steps": steps, "streaming": streaming}
        record = finetune(recipe_of(tiny_model, tiny_data, **settings), progress=False, resume=resume)
        assert record.resumed_from == (3 if resume else None)
        return [entry["loss"] for entry in record.log if "loss" in entry]

    whole = losses("whole", steps=6, streaming=False)
    assert len(whole) == 6
    assert losses("streamed", steps=6) == whole
    assert losses("cut", steps=3) == whole[:3]
    assert losses("cut", steps=6, resume=True) == whole
