"""Evaluation of understanding: it goes on after a stop, and tells of each example what was asked and given."""

from __future__ import annotations

import json

import pytest
import torch

from evatune.cli.main import main
from evatune.tasks.journal import Journal
from evatune.tasks.understanding.evaluation import predict
from evatune.training import finetune

TAGGED = {"kind": "token-classification", "classes": ("O", "B-X")}


@pytest.mark.parametrize("kind", ["classification", "token-classification"])
def test_a_stopped_evaluation_goes_on_and_ends_alike(opened, texts, write_rows, tmp_path, kind):
    if kind == "classification":
        task = opened(train=(str(texts / "train.jsonl"),), eval=(str(texts / "test.jsonl"),))
    else:
        rows = [{"tokens": ["red"] * n + ["good"], "ner_tags": ["O"] * n + ["B-X"]} for n in range(1, 9)]
        path = write_rows("tagged.jsonl", *rows)
        task = opened(train=(path,), eval=(path,), **TAGGED)
    model, rows = task.load_model(), task.held_out.rows
    whole = predict(model, rows, task.collate, kind=task.kind, progress=False)
    passes = []

    def counted(batch):
        passes.append(len(batch))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return task.collate(batch)

    options = {"kind": task.kind, "progress": False, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt), Journal.open(tmp_path / "part", about={}) as journal:
        predict(model, rows, counted, journal=journal, **options)
    with Journal.open(tmp_path / "part", about={}, resume=True) as journal:
        again = predict(model, rows, counted, journal=journal, **options)
    assert sum(passes) - passes[2] == len(rows)  # no row twice
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(whole, again, strict=True))


def test_the_command_writes_outcomes_and_a_page(recipe, tmp_path, capsys):
    wanted = recipe(adapter={"method": "lora"}, train={"steps": 24})
    record = finetune(wanted, progress=False)
    outcomes, page = tmp_path / "outcomes.jsonl", tmp_path / "page.html"
    assert main(["evaluate", wanted.output, "--outcomes", str(outcomes), "--page", str(page), "--json"]) == 0
    rows = [json.loads(line) for line in outcomes.read_text().splitlines()]
    assert sum(row["right"] for row in rows) / len(rows) == record.after["metrics"]["accuracy"]
    assert all(row["expected"] in row["question"] for row in rows)
    assert rows[0]["question"].split()[0] in page.read_text()
