"""Training texts in files (`data.streaming`): the same batches and the same run as with all of them in memory."""

from __future__ import annotations

import json

import pytest
import torch

from evatune.tasks.disk_list import DiskList
from evatune.tasks.task import batches
from evatune.training import finetune

ANSWER = {"text": ["true"], "answer_start": [7]}
ROWS = {
    "classification": [{"sentence": f"{word} one", "label": word} for word in ("good", "bad")],
    "regression": [{"sentence": f"one {number}", "label": number} for number in (0.5, 2)],
    "token-classification": [{"tokens": ["red", word], "ner_tags": ["O", tag]} for word, tag in ("aX", "bO", "cX")],
    "question-answering": [
        {"question": f"which {n}?", "context": f"red is true {'blue ' * n}", "answers": ANSWER} for n in (1, 60)
    ],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("more", [{}, {"max_train_examples": 7}, {"validate": True}])
def test_batches_and_counts_are_the_same(kind, more, opened, write_rows):
    file = write_rows("train.jsonl", *ROWS[kind] * 6)
    settings = {"train": (file,), "kind": kind, "max_length": 64, "stride": 8} | more
    settings |= {} if "validate" in more else {"eval": (file,)}
    whole, streamed = (opened(streaming=on, **settings) for on in (False, True))
    assert isinstance(streamed.train.rows, DiskList) and isinstance(streamed.examples.items, DiskList)
    assert not isinstance(whole.train.rows, DiskList) and not isinstance(whole.examples.items, DiskList)
    pairs = list(zip(*(batches(task, batch_size=4, seed=3) for task in (whole, streamed)), strict=True))
    assert pairs
    for one, other in pairs:
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (whole.summary(), whole.facts(), whole.kinds()) == (streamed.summary(), streamed.facts(), streamed.kinds())
    assert whole.preview(3) == streamed.preview(3)
    assert list(whole.held_out) == list(streamed.held_out)


def test_a_run_is_the_same(recipe):
    logs = []
    for on in (False, True):
        settings = recipe(f"streaming-{on}", train={"steps": 4, "logging_steps": 1})
        settings = settings.from_dict(settings.to_dict() | {"data": settings.to_dict()["data"] | {"streaming": on}})
        record = finetune(settings, progress=False)
        logs.append((record.losses, record.after["metrics"]))
    assert json.dumps(logs[0]) == json.dumps(logs[1])
