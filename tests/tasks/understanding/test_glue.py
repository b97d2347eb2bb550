"""GLUE: every task from rows of the hub and of the published files."""

from __future__ import annotations

import json
import typing

import pytest

from evatune.errors import EvaError
from evatune.recipe import load_recipe
from evatune.tasks.understanding.glue import TASKS
from evatune.tasks.understanding.held_out import read_held_out
from evatune.tasks.understanding.kinds import kind_of
from evatune.tasks.understanding.settings import UnderstandingData

HUB_ROWS = {
    "cola": {"sentence": "a", "label": 1, "idx": 0},
    "sst2": {"sentence": "a", "label": 0, "idx": 0},
    "mrpc": {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0},
    "qqp": {"question1": "a", "question2": "b", "label": 0, "idx": 0},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 2.5, "idx": 0},
    "mnli": {"premise": "a", "hypothesis": "b", "label": 2, "idx": 0},
    "qnli": {"question": "a", "sentence": "b", "label": 0, "idx": 0},
    "rte": {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0},
}
HUB_LABELS = {
    "cola": "acceptable",
    "sst2": "negative",
    "mrpc": "equivalent",
    "qqp": "not_duplicate",
    "stsb": "2.5",
    "mnli": "contradiction",
    "qnli": "entailment",
    "rte": "not_entailment",
}
FILE_ROWS = {
    "sst2": {"sentence": "a", "label": "1"},
    "mrpc": {"Quality": "1", "#1 ID": "1", "#2 ID": "2", "#1 String": "a", "#2 String": "b"},
    "qqp": {"id": "1", "qid1": "1", "qid2": "2", "question1": "a", "question2": "b", "is_duplicate": "1"},
    "stsb": {"index": "1", "sentence1": "a", "sentence2": "b", "score": "3.250"},
    "mnli": {
        "sentence1_parse": "(a)",
        "sentence1": "a",
        "sentence2": "b",
        "label1": "neutral",
        "gold_label": "neutral",
    },
    "qnli": {"index": "1", "question": "a", "sentence": "b", "label": "not_entailment"},
    "rte": {"index": "1", "sentence1": "a", "sentence2": "b", "label": "entailment"},
}
FILE_LABELS = {
    "sst2": "positive",
    "mrpc": "equivalent",
    "qqp": "duplicate",
    "stsb": "3.250",
    "mnli": "neutral",
    "qnli": "not_entailment",
    "rte": "entailment",
}
HEADLINES = {"cola": "matthews", "stsb": "pearson"}


def test_the_setting_has_every_row():
    literal, _ = typing.get_args(typing.get_type_hints(UnderstandingData)["glue"])
    assert typing.get_args(literal) == tuple(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_rows_of_the_hub(name):
    data = UnderstandingData(glue=name)
    assert (data.train, data.eval, data.hub_config) == (("nyu-mll/glue",), ("nyu-mll/glue",), name)
    assert data.eval_split.startswith("validation")
    example = kind_of(data).converter(HUB_ROWS[name], "x")(HUB_ROWS[name])
    assert example.label == HUB_LABELS[name]
    assert example.texts == (("a",) if name in ("cola", "sst2") else ("a", "b"))
    assert kind_of(data).converter(HUB_ROWS[name], "x")(HUB_ROWS[name] | {"label": -1}) is None
    assert TASKS[name].headline == HEADLINES.get(name, "accuracy")


@pytest.mark.parametrize("name", FILE_ROWS)
def test_rows_of_files(name):
    kind = kind_of(UnderstandingData(glue=name, train="train.tsv"))
    assert kind.converter(FILE_ROWS[name], "x")(FILE_ROWS[name]).label == FILE_LABELS[name]


def test_data_that_are_named_are_not_replaced():
    data = UnderstandingData(glue="rte", train="train.tsv")
    assert (data.train, data.eval, data.hub_config, data.eval_split) == (("train.tsv",), (), None, "validation")


def test_a_folder_is_scored_on_its_validation_splits(tmp_path):
    for name, label in (("train", 0), ("validation_matched", 1), ("validation_mismatched", 2), ("test_matched", -1)):
        row = {"premise": name, "hypothesis": "a", "label": label}
        (tmp_path / f"{name}-00000-of-00001.jsonl").write_text(json.dumps(row))
    data = UnderstandingData(glue="mnli", train=str(tmp_path), eval=str(tmp_path))
    found = read_held_out(data, kind_of(data).converter, seed=0)
    assert sorted(found.sets) == ["validation_matched", "validation_mismatched"]
    assert sorted(one.label for one in found.examples) == ["contradiction", "neutral"]
    data = UnderstandingData(glue="mnli", eval=str(tmp_path), eval_split="test_matched")
    with pytest.raises(EvaError, match=r"holds no usable example \(1 row without a question or an answer\)"):
        read_held_out(data, kind_of(data).converter, seed=0)


def test_classes_keep_their_numbers_whatever_the_training_data_hold():
    kind = kind_of(UnderstandingData(glue="mnli"))
    convert = kind.converter(HUB_ROWS["mnli"], "x")
    examples = [convert(HUB_ROWS["mnli"] | {"label": label}) for label in (2, 1)]
    assert kind.labels(examples) == ("entailment", "neutral", "contradiction")
    mixed = FILE_ROWS["mnli"] | {"gold_label": "-"}
    assert kind.converter(mixed, "x")(mixed) is None  # the annotators did not agree


def test_mistakes():
    kind = kind_of(UnderstandingData(glue="mrpc"))
    with pytest.raises(EvaError, match=r"label '2' is no class; the classes are .* by number from 0 to 1"):
        kind.converter(HUB_ROWS["mrpc"], "x")(HUB_ROWS["mrpc"] | {"label": 2})
    with pytest.raises(
        EvaError, match=r"no column of texts that is known \(sentence1 and sentence2, #1 String and #2 String\); it has"
    ):
        kind.converter(HUB_ROWS["cola"], "x")
    with pytest.raises(EvaError, match=r"data\.glue is 'sst-2', but must be .*\(did you mean 'sst2'"):
        load_recipe(None, {"task": "understanding", "glue": "sst-2"})


def test_columns_of_a_file_without_header_come_first():
    kind = kind_of(UnderstandingData(glue="cola", train="x.tsv", columns={"text": "4", "label": "2"}))
    row = {"1": "gj04", "2": "0", "3": "*", "4": "Him left.", "text": "Him left.", "label": "0"}
    assert kind.converter(row, "x")(row).label == "unacceptable"


PUBLISHED = {
    "cola": ("cola/in_domain_train.tsv", {"text": 4, "label": 2}, (8551, 0)),
    "sst2": ("sst2/train.tsv", {"text": 1, "label": 2}, (6920, 0)),
    "mrpc": ("mrpc/msr-para-train.tsv", None, (3576, 0)),
    "stsb": ("sts/test.tsv", {"label": 1, "text": 2, "text_pair": 3}, (2250, 2250)),
}
"""File, columns, and how many rows are kept and dropped."""


def test_the_published_files(real_data, opened):
    for name, (file, columns, counts) in PUBLISHED.items():
        task = opened(glue=name, train=str(real_data(f"glue/{file}")), columns=columns)
        assert (len(task.examples), task.examples.dropped) == counts
