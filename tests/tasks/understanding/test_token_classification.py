"""Token classification: tags of words, entities, and sentences that are longer than the model takes."""

from __future__ import annotations

import random

import pytest
import torch
from tests.on_device import IN_INFERENCE_MODE, TEST_DEVICE, TRAINED_BY_TRAINER

from evatune.errors import EvaError
from evatune.tasks.understanding.entities import entities, is_entity_tag
from evatune.tasks.understanding.settings import UnderstandingData
from evatune.tasks.understanding.token_classification import Tagged, TokenClassification
from evatune.training import finetune

PLAIN = TokenClassification(data=UnderstandingData())


@pytest.fixture
def sentences(write_rows):
    """Sentences in which the word good, and the blue behind it, is a name."""
    chance = random.Random(0)
    rows = []
    for _ in range(96):
        words, tags = [], []
        for _ in range(chance.randint(2, 5)):
            entity = chance.random() < 0.4
            words += ["good", "blue"] if entity else ["red"]
            tags += ["B-PER", "I-PER"] if entity else ["O"]
        rows.append({"tokens": words, "ner_tags": tags})
    return write_rows("train.jsonl", *rows), write_rows("test.jsonl", *rows[:32])


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_a_run_learns_entities_and_plain_peft_loads_it(recipe, sentences, encoder, opened):
    from peft import PeftModel
    from transformers import AutoModelForTokenClassification

    train, test = sentences
    data = {"kind": "token-classification", "train": [train], "eval": [test]}
    wanted = recipe(data=data, train={"steps": 40})
    record = finetune(wanted, progress=False)
    assert record.after["headline"] == "f1"
    assert record.after["metrics"]["f1"] > max(0.8, record.before["metrics"]["f1"])
    low, high = record.after["intervals"]["f1"]
    assert low <= record.after["metrics"]["f1"] <= high
    assert set(record.data["tags"]) == {"B-PER", "I-PER", "O"}
    base = AutoModelForTokenClassification.from_pretrained(encoder, num_labels=3)
    again = opened(**data).evaluate(PeftModel.from_pretrained(base, f"{wanted.output}/adapter"), progress=False)
    assert again["f1"] == record.after["metrics"]["f1"]


def test_the_first_token_of_each_word_learns_its_tag(opened, sentences, tiny_model):
    for model in (None, tiny_model):  # with and without special tokens
        options = {} if model is None else {"model": model}
        task = opened(**options, kind="token-classification", train=(sentences[0],))
        row = task.train[0]
        learned = [place for place, label in enumerate(row["labels"]) if label != -100]
        assert learned == list(row["places"].values())
        for word, place in row["places"].items():
            piece = task.tokenizer.decode(row["input_ids"][place]).strip()
            assert piece
            assert row["words"][word].startswith(piece)
        batch = task.collate([task.train[0], task.train[1]])
        assert batch["labels"].shape == batch["input_ids"].shape
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.on_hardware(IN_INFERENCE_MODE)
def test_padding_changes_no_outcome(opened, sentences):
    task = opened(kind="token-classification", train=(sentences[0],), eval=(sentences[1],))
    model = task.load_model().to(TEST_DEVICE)
    together, alone = task.evaluate(model, progress=False), task.evaluate(model, limit=1, progress=False)
    assert together.outcomes["nll"][0] == pytest.approx(alone.outcomes["nll"][0], rel=1e-4)
    row = task.held_out[0]
    with torch.no_grad():
        log_probs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    oracle = -sum(float(log_probs[place, row["labels"][place]]) for place in row["places"].values())
    assert alone.outcomes["nll"][0] == pytest.approx(oracle, rel=1e-4)


def test_words_that_are_cut_off_count_as_outside(opened, write_rows):
    rows = [{"tokens": ["red"] * 30 + ["good"], "ner_tags": ["O"] * 30 + ["B-PER"]}]
    path = write_rows("long.jsonl", *rows)
    task = opened(kind="token-classification", train=(path,), eval=(path,), max_length=8)
    assert task.train.cut == 1
    scores = task.evaluate(task.load_model(), progress=False)
    assert scores.counts["cut"] == 1
    assert scores.counts["words"] == 31 > scores.counts["seen_words"]
    assert scores.outcomes["found"] == [0]
    assert scores.outcomes["expected"] == [1]
    assert scores.examples[0]["expected"] == "good/B-PER"
    assert scores.examples[0]["right"] is False


def test_tags_that_are_no_entities_are_scored_by_words(opened, write_rows):
    path = write_rows("pos.jsonl", {"words": ["red", "runs"], "pos_tags": ["ADJ", "VERB"]})
    task = opened(kind="token-classification", train=(path,), eval=(path,))
    assert list(task.evaluate(task.load_model(), progress=False).metrics) == ["accuracy", "loss"]
    assert "red/ADJ runs/VERB" in task.preview(1).text


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("I-PER I-PER I-LOC", {("PER", 0, 1), ("LOC", 2, 2)}),  # IOB1
        ("B-PER I-LOC", {("PER", 0, 0), ("LOC", 1, 1)}),
        ("S-PER B-LOC I-LOC E-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 3), ("LOC", 4, 4)}),  # BIOES
        ("U-PER B-LOC L-LOC O", {("PER", 0, 0), ("LOC", 1, 2)}),  # BILOU
        ("O O", set()),
    ],
)
def test_entities_of_every_scheme(tags, expected):
    assert entities(tags.split()) == expected
    assert all(map(is_entity_tag, tags.split()))
    assert not is_entity_tag("NOUN")


def test_rows_and_their_mistakes():
    row = {"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}
    convert = PLAIN.converter(row, "x")
    assert convert(row) == Tagged(words=("a", "b"), tags=("O", "B-X"))
    assert convert({"tokens": [], "ner_tags": []}) is None
    with pytest.raises(EvaError, match="there are 2 words in 'tokens', but 1 tags in 'ner_tags'"):
        convert(row | {"ner_tags": ["O"]})
    with pytest.raises(EvaError, match="column 'tokens' holds 'a b', which is not a list"):
        convert(row | {"tokens": "a b"})
    with pytest.raises(EvaError, match="column 'ner_tags' holds None, which is not a list"):
        convert({"tokens": ["a", "b"]})
    with pytest.raises(EvaError, match=r"the tags are numbers \(0\): give their names .* with data\.classes"):
        convert(row | {"ner_tags": [0, 1]})
    with pytest.raises(EvaError, match=r"x has no column of ner_tags that is known .*\(ner_tags=NAME\)"):
        PLAIN.converter({"tokens": ["a"]}, "x")
    named = TokenClassification(data=UnderstandingData(classes=("O", "B-X")))
    assert named.converter(row, "x")(row | {"ner_tags": [1, 0]}).tags == ("B-X", "O")
    with pytest.raises(EvaError, match=r"tag 'B-Y' is none of data\.classes"):
        named.converter(row, "x")(row | {"ner_tags": ["O", "B-Y"]})
    with pytest.raises(EvaError, match="all training words have the tag 'O'; two are needed at least"):
        PLAIN.labels([Tagged(words=("a",), tags=("O",))])


def test_tags_of_a_hub_data_set_are_read_by_their_names(opened, monkeypatch):
    import datasets

    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    rows = {"tokens": [["Ada", "Lovelace", "wrote"]], "ner_tags": [[1, 2, 0]]}
    data = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, *, split: data)
    (example,) = opened(kind="token-classification", train=("some/set",)).examples
    assert example.tags == ("B-PER", "I-PER", "O")
