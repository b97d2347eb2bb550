"""Understanding: texts and classes, a new head that is trained whole, and an adapter that plain PEFT loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.on_device import IN_INFERENCE_MODE, TEST_DEVICE, TRAINED_BY_TRAINER
from transformers import AutoModelForSequenceClassification

from evatune.errors import EvaError
from evatune.models import load_tokenizer
from evatune.spectra import Spectra
from evatune.tasks import open_task
from evatune.tasks.settings import ModelSettings
from evatune.tasks.understanding.settings import UnderstandingData
from evatune.training import finetune
from evatune.training.evaluation import evaluate


@pytest.mark.parametrize("method", ["eva", "lora", "pissa", "eva+dora"])
@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_one_word_changes_the_method_and_plain_peft_loads_the_adapter_with_its_head(recipe, encoder, opened, method):
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
    task = opened(train=wanted.data.train, eval=wanted.data.eval)
    again = task.evaluate(loaded, progress=False)
    assert again["accuracy"] == after
    assert again["loss"] == pytest.approx(record.after["metrics"]["loss"], rel=1e-5)


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
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


def test_decoders_pad_with_what_they_have(tiny_model, texts, opened):
    """The tiny Llama gets a `score` head, which reads the last token that is no padding."""
    task = opened(tiny_model, train=(str(texts / "train.jsonl"),), eval=(str(texts / "test.jsonl"),))
    model = task.load_model()
    assert task.needs(model).heads == ("score",)
    together, alone = task.evaluate(model, progress=False), task.evaluate(model, limit=1, progress=False)
    assert together.outcomes["nll"][0] == pytest.approx(alone.outcomes["nll"][0], rel=1e-4)


@pytest.mark.on_hardware(IN_INFERENCE_MODE)
def test_scores_against_a_plain_computation(texts, opened):
    task = opened(train=(str(texts / "train.jsonl"),), eval=(str(texts / "test.jsonl"),))
    model = task.load_model().to(TEST_DEVICE)
    scores = task.evaluate(model, progress=False)
    for row, right, nll in zip(task.held_out, scores.outcomes["right"], scores.outcomes["nll"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        assert nll == pytest.approx(-float(logits.log_softmax(-1)[row["labels"]]), rel=1e-4)
        assert right == float(logits.argmax() == row["labels"])
    assert scores.counts == {"examples": 40, "dropped": 0, "cut": 0}


def test_preview_shows_special_tokens_and_the_class(texts, opened):
    task = opened(train=(str(texts / "train.jsonl"),), max_length=8)
    preview = task.preview(2)
    assert len(preview.content) == 2
    assert all(row["tokens"] <= 8 for row in preview.content)
    assert preview.text.count("→ ⟦") == 2
    assert "longer than 8 tokens, cut at the right" in task.summary()


@pytest.mark.parametrize(("cut", "kept"), [("right", "red red"), ("left", "bad bad")])
def test_long_texts_are_cut_at_the_stated_side_and_counted(opened, write_rows, cut, kept):
    long = {"text": "red " * 30 + "bad " * 30, "label": "bad"}
    path = write_rows("train.jsonl", long, {"text": "blue", "label": "good"})
    task = opened(train=(path,), eval=(path,), max_length=16, cut=cut)
    text = max((row["text"] for row in task.preview(2).content), key=len)
    assert kept in text
    assert not {"red red", "bad bad"} - {kept} & {text}
    assert task.facts()["train_shortened"] == 1
    assert task.evaluate(task.load_model(), progress=False).counts["cut"] == 1


def test_sequences_that_the_model_cannot_take_are_refused(opened, texts):
    with pytest.raises(EvaError, match=r"data\.max_length is 1024, but .* takes 512 tokens at most"):
        _ = opened(train=(str(texts / "train.jsonl"),), max_length=1024).train


def test_a_tokenizer_without_any_padding_is_refused(opened, encoder, texts, tmp_path):
    tokenizer = load_tokenizer(encoder)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(EvaError, match="has neither a padding token nor an end token; set pad_token in"):
        _ = opened(tmp_path, train=(str(texts / "train.jsonl"),)).train


def test_texts_without_words_are_dropped_and_counted(opened, write_rows):
    rows = [{"text": "", "label": "good"}, {"text": " ", "label": "bad"}, {"text": "a", "label": "good"}]
    lacking = [{"text": None, "label": "bad"}, {"label": "bad"}, {"text": "b"}, {"text": "b", "label": None}]
    path = write_rows("train.jsonl", {"text": "b", "label": "bad"}, *rows, *lacking)
    facts = opened(train=(path,)).facts()
    assert (facts["train"], facts["train_dropped"]) == (2, 6)


def test_a_pooler_that_the_checkpoint_lacks_is_a_part_of_the_head(recipe, opened, encoder, texts, tmp_path):
    """Checkpoints of masked language models have no pooler, which then is random and must be trained whole."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(encoder, tmp_path / "model")
    weights = load_file(encoder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    task = opened(tmp_path / "model", train=(str(texts / "train.jsonl"),), eval=(str(texts / "test.jsonl"),))
    assert task.needs(task.load_model()).heads == ("bert.pooler", "classifier")
    wanted = recipe(model={"name": str(tmp_path / "model")})
    record = finetune(wanted, progress=False)
    assert not any("pooler" in name for name in json.loads((Path(wanted.output) / "plan.json").read_text())["ranks"])
    again = evaluate(wanted, adapter=Path(wanted.output) / "adapter", progress=False)
    assert again["accuracy"] == record.after["metrics"]["accuracy"]


ENCODERS = {
    "Roberta": ("classifier",),
    "DebertaV2": ("pooler", "classifier"),
    "DistilBert": ("pre_classifier", "classifier"),
    "Electra": ("classifier",),
    "ModernBert": ("head", "classifier"),
}
"""Class of the model -> its new head."""


@pytest.mark.parametrize("name", ENCODERS)
def test_any_encoder_trains_its_head_whole_and_measures_the_rest(recipe, opened, encoder, texts, tmp_path, name):
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    renamed = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    shape |= {"pos_att_type": "p2c|c2p", "relative_attention": True, "position_buckets": 16} if "V2" in name else {}
    if name == "DistilBert":
        shape = {renamed.get(key, "hidden_dim"): value for key, value in shape.items()}
    shape |= {"reference_compile": False} if name == "ModernBert" else {}
    tokenizer = load_tokenizer(encoder)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 514}
    config = getattr(transformers, f"{name}Config")(**shape, **ids)
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    task = opened(tmp_path / "model", train=(str(texts / "train.jsonl"),))
    assert task.needs(task.load_model()).heads == ENCODERS[name]
    wanted = recipe(model={"name": str(tmp_path / "model")}, train={"steps": 2})
    record = finetune(wanted, progress=False)
    assert record.steps == 2
    ranks = json.loads((Path(wanted.output) / "plan.json").read_text())["ranks"]
    assert ranks
    assert not any(target.startswith(ENCODERS[name]) for target in ranks)


def test_a_search_is_scored_on_a_share_of_the_training_texts(texts, opened):
    files = {"train": (str(texts / "train.jsonl"),), "eval": (str(texts / "test.jsonl"),)}
    task, whole = opened(validate=True, held_out=0.25, **files), opened(**files)
    assert len(task.held_out) == round(0.25 * len(whole.train))
    assert len(task.train) + len(task.held_out) == len(whole.train)


@pytest.mark.parametrize("stated", ["regression", "multi_label_classification", "single_label_classification"])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_loss_is_that_of_the_kind_and_not_of_the_checkpoint(opened, encoder, write_rows, tmp_path, stated, kind):
    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": stated}))
    path = write_rows("rows.jsonl", *({"text": f"red {n}", "label": n % 3} for n in range(6)))
    task = opened(folder, train=(path,), eval=(path,), kind=kind)
    model = task.load_model()
    with torch.no_grad():
        loss = float(model(**task.collate(task.train.rows)).loss)
    assert loss == pytest.approx(task.evaluate(model, progress=False)["loss"], rel=1e-4)


@pytest.mark.parametrize("positions", [None, 64])
def test_how_long_a_sequence_may_be_is_asked_with_the_settings_of_the_model(encoder, monkeypatch, positions):
    """Where the tokenizer does not say it."""
    asked = []

    def from_pretrained(name, **options):
        asked.append(options)
        return SimpleNamespace(max_position_embeddings=positions)

    source = ModelSettings(name=str(encoder), revision="main", trust_remote_code=True)
    task = open_task("understanding", UnderstandingData(max_length=4096), model=source, seed=0)
    tokenizer = load_tokenizer(encoder)
    tokenizer.model_max_length = 10**30
    monkeypatch.setattr("evatune.tasks.understanding.task.load_tokenizer", lambda *args, **options: tokenizer)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    if positions is None:
        assert task.tokenizer is tokenizer
    else:
        with pytest.raises(EvaError, match=r"data.max_length is 4096, but .* takes 64 tokens at most"):
            task.tokenizer  # noqa: B018
    assert asked == [{"revision": "main", "trust_remote_code": True}]


@pytest.mark.parametrize("settings", [{"classes": ("bad", "good")}, {"kind": "question-answering"}])
def test_training_data_are_not_read_for_outputs_that_are_known(opened, settings):
    assert len(opened(train=("no_such.jsonl",), **settings).labels) == 2


def test_one_class_is_nothing_to_learn(opened, write_rows):
    task = opened(train=(write_rows("rows.jsonl", {"text": "red", "label": "good"}),), classes=("bad", "good"))
    with pytest.raises(EvaError, match="all training texts are of class 'good'"):
        task.summary()


def test_a_head_is_not_scored_on_other_classes_of_the_same_number(opened, write_rows, tmp_path):
    def rows(name: str, *labels: str) -> tuple[str]:
        return (write_rows(name, *({"text": "red", "label": label} for label in labels)),)

    (tmp_path / "saved").mkdir()
    opened(train=rows("a.jsonl", "bad", "good")).save_processor(tmp_path / "saved")
    opened(train=rows("b.jsonl", "good", "bad")).check_saved(tmp_path / "saved")
    other = opened(train=rows("c.jsonl", "bad", "fair"))
    with pytest.raises(EvaError, match=r"2 classes \(bad, good\), .* 2 classes \(bad, fair\); .*data.classes"):
        other.check_saved(tmp_path / "saved")
    other.check_saved(tmp_path)  # nothing was saved there


def test_a_step_of_two_batches_is_that_of_one_as_large(recipe, tiny_model):
    model = {"name": str(tiny_model)}  # without dropout
    logs = []
    for name, more in (("whole", {"batch_size": 16}), ("halves", {"batch_size": 8, "gradient_accumulation": 2})):
        train = {"steps": 3, "logging_steps": 1, "max_grad_norm": 0.0} | more
        adapter = {"method": "lora", "lora_dropout": 0.0}
        logs.append(finetune(recipe(name, model=model, adapter=adapter, train=train), progress=False).losses)
    for whole, halves in zip(*logs, strict=True):
        assert halves["loss"] == pytest.approx(whole["loss"], rel=1e-3)
        assert halves["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
