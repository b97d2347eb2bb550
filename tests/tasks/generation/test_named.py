"""Names of tasks: groups, places on the hub and on disk, and mistakes."""

from __future__ import annotations

import json

import pytest

from evatune.errors import EvaError
from evatune.tasks.generation.examples import load_examples
from evatune.tasks.generation.named import GROUPS, NAMED, expanded, places

QUESTION = {"goal": "Open a tin", "sol1": "with a tin opener", "sol2": "with a spoon", "label": 0}


@pytest.fixture
def folder(tmp_path):
    for name, count in (("piqa", 3), ("social_i_qa", 2)):
        home = tmp_path / "commonsense" / name
        home.mkdir(parents=True)
        rows = [QUESTION | {"goal": f"{name} {number}"} for number in range(count)]
        (home / "train.json").write_text(json.dumps(rows))
        (home / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    return str(tmp_path)


def test_a_group_means_its_tasks():
    assert len(GROUPS["commonsense"]) == 8
    assert expanded(["commonsense", "some/hub-id"]) == [*GROUPS["commonsense"], "some/hub-id"]
    assert expanded(["gsm8k", "commonsense/piqa"]) == ["gsm8k", "commonsense/piqa"]
    for sources in (["commonsense/piqa", "commonsense"], ["commonsense", "commonsense/piqa"]):
        assert sorted(expanded(sources)) == sorted(GROUPS["commonsense"])
    assert expanded(["gsm8k", "gsm8k"]) == ["gsm8k", "gsm8k"]  # which is an error later


def test_on_the_hub():
    found = places(["commonsense/arc-c", "data.json"], folder=None, held_out=False)
    assert found == {
        "commonsense/arc-c": [{"name": "allenai/ai2_arc", "split": "train", "hub_config": "ARC-Challenge"}]
    }
    (scored,) = places(["commonsense/boolq"], folder=None, held_out=True)["commonsense/boolq"]
    assert scored["split"] == "validation"


def test_on_disk(folder):
    tasks = ["commonsense/piqa", "commonsense/siqa"]
    examples = load_examples(tasks, folder=folder)
    assert sorted(example.task for example in examples) == ["piqa"] * 3 + ["siqa"] * 2
    assert examples.summary() == "5 examples from piqa, siqa"
    assert len(load_examples(tasks, folder=folder, held_out=True)) == 2


def test_a_copy_in_several_files(folder, tmp_path):
    home = tmp_path / "commonsense" / "hellaswag"
    home.mkdir()
    for number in range(2):
        (home / f"train-0000{number}-of-00002.json").write_text(json.dumps([QUESTION]))
    assert len(load_examples(["commonsense/hellaswag"], folder=folder)) == 2


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (["commonsense/boolk"], {}, r"there is no task 'commonsense/boolk' \(did you mean 'commonsense/boolq'"),
        (["math/algbra"], {}, r"did you mean 'math/algebra'.*math has math/algebra, math/counting"),
        (["commonsense"], {"folder": True}, "no copy of task 'commonsense/boolq': commonsense/boolq/train{.jsonl"),
        (["humaneval"], {}, "task 'humaneval' is for scoring only; name another one in data.train"),
        (["metamath"], {"held_out": True}, "task 'metamath' is for training only; name another one in data.eval"),
    ],
)
def test_mistakes(sources, options, message, folder):
    with pytest.raises(EvaError, match=message):
        load_examples(sources, **(options | {"folder": folder} if "folder" in options else options))


def test_a_file_is_taken_before_a_task_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(EvaError, match="the folder gsm8k holds no data file"):
        load_examples(["gsm8k"])


def test_every_task_can_be_learned_or_scored():
    assert all(task.train or task.held_out for task in NAMED.values())


@pytest.mark.parametrize(("name", "meant"), [("comonsense/boolq", "commonsense/boolq"), ("gsm8", "gsm8k")])
def test_a_name_that_is_nowhere_may_be_a_task_misspelt(name, meant):
    with pytest.raises(
        EvaError, match=rf"no data file {name}, .*; no task has this name either \(did you mean .*'{meant}'"
    ):
        load_examples(name)
