"""Several held-out sets: each has the headline of its own."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from evatune.tasks.understanding.held_out import read_held_out
from evatune.tasks.understanding.kinds import kind_of
from evatune.tasks.understanding.settings import UnderstandingData


@pytest.fixture
def two_files(write_rows):
    one = write_rows("one.jsonl", *({"text": f"red {n}", "label": "good"} for n in range(6)))
    two = write_rows("two.jsonl", *({"text": f"blue {n}", "label": "bad"} for n in range(4)))
    return one, two


def test_each_set_has_its_own_headline(opened, two_files, texts):
    task = opened(train=(str(texts / "train.jsonl"),), eval=two_files)
    scores = task.evaluate(task.load_model(), progress=False)
    assert list(scores.numbers()) == ["accuracy", "matthews", "loss", "f1", "accuracy (one)", "accuracy (two)"]
    assert len(scores.outcomes["right (one)"]) == 6
    assert sorted(told["set"] for told in scores.examples) == ["one"] * 6 + ["two"] * 4
    assert all((told["set"] == "one") == ("red" in told["question"]) for told in scores.examples)
    right = 6 * scores["accuracy (one)"] + 4 * scores["accuracy (two)"]
    assert right == pytest.approx(10 * scores["accuracy"])


def test_a_limit_keeps_examples_of_all_sets(opened, two_files, texts):
    task = opened(train=(str(texts / "train.jsonl"),), eval=two_files, max_eval_examples=7)
    model = task.load_model()
    whole = task.evaluate(model, progress=False)
    assert len(whole.outcomes["right"]) == 7
    assert len(whole.outcomes["right (one)"]) + len(whole.outcomes["right (two)"]) == 7
    assert whole.outcomes["right"][:5] == task.evaluate(model, limit=5, progress=False).outcomes["right"]


def test_splits_of_a_hub_data_set_are_joined_by_a_plus(monkeypatch):
    def load_dataset(name, config, *, split):
        assert (name, config) == ("nyu-mll/glue", "mnli")
        return [{"premise": split, "hypothesis": str(n), "label": n % 3} for n in range(5)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = UnderstandingData(glue="mnli", max_eval_examples=None)
    held_out = read_held_out(data, kind_of(data).converter, seed=0)
    assert len(held_out.examples) == 10
    assert set(held_out.sets) == {"validation_matched", "validation_mismatched"}
    assert [example.texts[0] for example in held_out.examples] == list(held_out.sets)


@pytest.fixture
def read():
    def read_with(**data):
        settings = UnderstandingData(**data)
        return read_held_out(settings, kind_of(settings).converter, seed=0)

    return read_with


@pytest.mark.parametrize("place", ["data", "dat?"])
@pytest.mark.parametrize("split", ["test", "dev", "dev+test"])
def test_a_folder_has_splits(read, write_rows, tmp_path, split, place):
    for name, count in (("train", 5), ("test", 3), ("dev", 2)):
        (tmp_path / "data" / name).mkdir(parents=True)
        write_rows(f"data/{name}/rows.jsonl", *({"text": f"{name} {n}", "label": n % 2} for n in range(count)))
    found = read(eval=(str(tmp_path / place),), eval_split=split)
    assert [example.texts[0].split()[0] for example in found.examples] == list(found.sets)
    assert sorted(found.sets) == sorted(["dev"] * 2 * ("dev" in split) + ["test"] * 3 * ("test" in split))


def test_a_folder_without_splits_is_read_once(read, write_rows, tmp_path):
    write_rows("part.jsonl", {"text": "red", "label": 0})
    assert len(read(eval=(str(tmp_path),), eval_split="dev+test").examples) == 1


def test_a_pattern_is_read_once_and_may_fit_folders(read, write_rows, tmp_path):
    for n in range(2):
        write_rows(f"dev_{n}.jsonl", {"text": f"red {n}", "label": n})
    (tmp_path / "dev_2.jsonl").mkdir()
    write_rows("dev_2.jsonl/part.jsonl", {"text": "red 2", "label": 0})
    found = read(eval=(str(tmp_path / "dev_*.jsonl"),), eval_split="validation_matched+validation_mismatched")
    assert sorted(example.texts[0] for example in found.examples) == ["red 0", "red 1", "red 2"]
    assert set(found.sets) == {"dev_*"}
