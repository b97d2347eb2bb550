"""Understanding: texts and classes, a new head that is trained whole, and an adapter that plain PEFT loads."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from evatune.errors import EvaError
from evatune.models import load_tokenizer
from evatune.recipe import Recipe
from evatune.spectra import Spectra
from evatune.tasks import open_task
from evatune.tasks.settings import ModelSettings
from evatune.tasks.understanding.examples import Labelled, classes_of, find_columns
from evatune.tasks.understanding.settings import UnderstandingData
from evatune.training import finetune


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


def opened(encoder: Path, **data):
    return open_task("understanding", UnderstandingData(**data), model=ModelSettings(name=str(encoder)), seed=0)


@pytest.mark.parametrize("method", ["eva", "lora", "pissa", "eva+dora"])
def test_one_word_changes_the_method_and_plain_peft_loads_the_adapter_with_its_head(recipe, encoder, method):
    from peft import PeftModel

    wanted = recipe(adapter={"method": method})
    record = finetune(wanted, progress=False)
    before, after = record.before["metrics"]["accuracy"], record.after["metrics"]["accuracy"]
    assert after > max(0.8, before)
    low, high = record.before["intervals"]["accuracy"]
    assert low < before < high
    assert sum(record.data["classes"].values()) == 96

    torch.manual_seed(123)  # the head that PEFT's user makes is another one, and is replaced
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    loaded = PeftModel.from_pretrained(base, Path(wanted.output) / "adapter")
    task = opened(encoder, train=wanted.data.train, eval=wanted.data.eval)
    again = task.evaluate(loaded, progress=False)
    assert again["accuracy"] == after
    assert again["loss"] == pytest.approx(record.after["metrics"]["loss"], rel=1e-5)


def test_the_head_is_trained_whole_and_never_starts_from_eva(recipe):
    wanted = recipe(train={"steps": 2})
    record = finetune(wanted, progress=False)
    spectra = Spectra.load(Path(wanted.output) / "spectra")
    assert not any("classifier" in name for name in spectra.targets)
    plan = json.loads((Path(wanted.output) / "plan.json").read_text())
    assert not any("classifier" in name for name in plan["ranks"])
    from safetensors.torch import load_file

    first, last = (
        load_file(Path(wanted.output) / name / "adapter_model.safetensors") for name in ("initial_adapter", "adapter")
    )
    heads = [name for name in last if "classifier" in name]
    assert sorted(name.rpartition(".")[2] for name in heads) == ["bias", "weight"]
    assert not torch.equal(first[heads[0]], last[heads[0]])
    n_head = 2 * 32 + 2
    assert record.parameters["trainable"] == plan["n_parameters"] + n_head


def test_the_seed_decides_the_new_head(recipe):
    from safetensors.torch import load_file

    heads = {}
    for name, seed, noise in (("one", 0, 1), ("two", 0, 2), ("three", 1, 1)):
        torch.manual_seed(noise)  # what happened before in this process does not matter
        wanted = recipe(name, adapter={"method": "lora"}, train={"steps": 1, "seed": seed})
        finetune(wanted, progress=False)
        weights = load_file(Path(wanted.output) / "initial_adapter" / "adapter_model.safetensors")
        heads[name] = next(weights[key] for key in weights if key.endswith("classifier.weight"))
    assert torch.equal(heads["one"], heads["two"])
    assert not torch.equal(heads["one"], heads["three"])


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(recipe):
    from safetensors.torch import load_file

    wanted = recipe(train={"steps": 6, "save_steps": 3, "keep_checkpoints": 2})
    finetune(wanted, progress=False)
    folder = Path(wanted.output)
    final = load_file(folder / "adapter" / "adapter_model.safetensors")
    (folder / "run.json").unlink()
    (folder / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    assert finetune(wanted, resume=True, progress=False).resumed_from == 3
    again = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert final.keys() == again.keys()
    assert all(torch.equal(final[name], again[name]) for name in final)


def test_decoders_pad_with_what_they_have(tiny_model, texts):
    """The tiny Llama gets a `score` head, which reads the last token that is no padding."""
    task = opened(tiny_model, train=(str(texts / "train.jsonl"),), eval=(str(texts / "test.jsonl"),))
    model = task.load_model()
    assert task.needs(model).heads == ("score",)
    together, alone = task.evaluate(model, progress=False), task.evaluate(model, limit=1, progress=False)
    assert together.outcomes["nll"][0] == pytest.approx(alone.outcomes["nll"][0], rel=1e-4)


def test_scores_against_a_plain_computation(encoder, texts):
    task = opened(encoder, train=(str(texts / "train.jsonl"),), eval=(str(texts / "test.jsonl"),))
    model = task.load_model()
    scores = task.evaluate(model, progress=False)
    for row, right, nll in zip(task.held_out, scores.outcomes["right"], scores.outcomes["nll"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        assert nll == pytest.approx(-float(logits.log_softmax(-1)[row["labels"]]), rel=1e-4)
        assert right == float(logits.argmax() == row["labels"])
    assert scores.counts == {"examples": 40, "dropped": 0}


def test_classes_are_in_the_order_of_numbers_or_of_the_alphabet():
    assert classes_of([Labelled(texts=("a",), label=label) for label in ("10", "2", "-3", "2")]) == ("-3", "2", "10")
    assert classes_of([Labelled(texts=("a",), label=label) for label in ("no", "maybe")]) == ("maybe", "no")
    with pytest.raises(EvaError, match="all training texts are of class 'x'; a classifier needs two at least"):
        classes_of([Labelled(texts=("a",), label="x")])


def test_columns_are_found_by_their_usual_names():
    pair = find_columns({"sentence1": "a", "sentence2": "b", "label": 1}, "x")
    assert pair({"sentence1": "a", "sentence2": "b", "label": 1}) == Labelled(texts=("a", "b"), label="1")
    assert pair({"sentence1": "a", "sentence2": "b", "label": -1}) is None  # hidden
    assert pair({"sentence1": "a", "sentence2": "b", "label": " "}) is None
    with pytest.raises(EvaError, match="column 'sentence2' holds 3, which is not a string"):
        pair({"sentence1": "a", "sentence2": 3, "label": 1})
    with pytest.raises(EvaError, match=r"x has no column of labels that is known; it has text, gold: .*\(label=NAME\)"):
        find_columns({"text": "a", "gold": 1}, "x")


def test_a_class_that_training_never_saw_is_named(encoder, texts, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "red", "label": "goood"}\n')
    task = opened(encoder, train=(str(texts / "train.jsonl"),), eval=(str(tmp_path / "test.jsonl"),))
    with pytest.raises(EvaError, match=r"label 'goood' is no class of the training data \(did you mean 'good'"):
        _ = task.held_out


def test_preview_shows_special_tokens_and_the_class(encoder, texts):
    task = opened(encoder, train=(str(texts / "train.jsonl"),), max_length=8)
    preview = task.preview(2)
    assert len(preview.content) == 2
    assert all(row["tokens"] <= 8 for row in preview.content)
    assert preview.text.count("→ ⟦") == 2
    assert "longer than 8 tokens" in task.summary()
