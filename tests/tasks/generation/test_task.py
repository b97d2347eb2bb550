"""The task of generation: its preview, its facts, and what it needs."""

from __future__ import annotations

import json

import pytest

from evatune.errors import EvaError
from evatune.tasks import open_task
from evatune.tasks.generation.settings import GenerationData
from evatune.tasks.settings import ModelSettings


def opened(tiny_model, *, seed: int = 0, **data):
    return open_task("generation", GenerationData(**data), model=ModelSettings(name=str(tiny_model)), seed=seed)


def test_preview_is_what_the_model_sees_with_the_learned_part_marked(tiny_model, tiny_data):
    task = opened(tiny_model, train=(str(tiny_data / "train.jsonl"),))
    preview = task.preview(3)
    assert len(preview.content) == 3
    for row, content in zip(task.train.rows, preview.content, strict=False):
        assert "".join(piece["text"] for piece in content["pieces"]) == task.tokenizer.decode(row["input_ids"])
        (learned,) = [piece["text"] for piece in content["pieces"] if piece["learned"]]
        assert learned.endswith("</s>")
        assert learned.removesuffix("</s>").strip() in ("the correct answer is true", "the correct answer is false")
        assert content["tokens"] == len(row["input_ids"])
        assert f"⟦{learned}⟧" in preview.text
    assert preview.text.count("⟦the correct answer is") == 3


def test_preview_takes_held_out_examples_where_there_are_no_others(tiny_model, tiny_data):
    held_out = opened(tiny_model, eval=(str(tiny_data / "test.jsonl"),))
    assert "the correct answer is" in held_out.preview(1).text
    assert len(held_out.preview(5).content) == 5


def test_the_order_of_the_examples_is_the_seeds(tiny_model, tiny_data):
    data = {"train": (str(tiny_data / "train.jsonl"),), "max_train_examples": 7}
    first, again, other = (opened(tiny_model, seed=seed, **data).train.rows for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 7


def test_a_search_is_scored_on_a_share_of_the_training_examples(tiny_model, tiny_data):
    files = {"train": (str(tiny_data / "train.jsonl"),), "eval": (str(tiny_data / "test.jsonl"),)}
    task, whole = opened(tiny_model, validate=True, **files), opened(tiny_model, **files)
    assert (len(task.train), len(task.held_out), len(whole.train)) == (48, 12, 60)
    assert {e.prompt for e in task.held_out}.isdisjoint(e.prompt for e in whole.held_out)


def test_a_limit_scores_the_first_examples(tiny_model, tiny_data):
    task = opened(tiny_model, eval=(str(tiny_data / "test.jsonl"),))
    model = task.load_model()
    scores = task.evaluate(model, limit=5, progress=False)
    assert scores.counts["examples"] == 5
    assert scores.outcomes["nll"] == pytest.approx(task.evaluate(model, progress=False).outcomes["nll"][:5])
    assert task.needs(model).heads == ()


def test_mistakes_in_the_data_are_told_before_the_model_is_loaded(tiny_model, tmp_path, monkeypatch):
    from evatune.tasks.generation import task as module

    monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(EvaError, match="line 1 is not JSON"):
        opened(tiny_model, train=(str(tmp_path / "bad.jsonl"),)).summary()


def test_how_held_out_examples_are_scored(tiny_model, tiny_data):
    task = opened(tiny_model, eval=(str(tiny_data / "test.jsonl"),), scoring="both", max_new_tokens=4)
    scores = task.evaluate(task.load_model(), limit=4, progress=False)
    assert {"loss", "accuracy", "generated"} <= set(scores.metrics)
    assert scores.counts["answers"] == 4
    assert set(scores.examples[0]) >= {"question", "expected", "given", "right", "written"}


def test_several_equal_answers_are_refused():
    with pytest.raises(EvaError, match=r"data\.samples is 5, but with data\.temperature 0 all answers are equal"):
        GenerationData(samples=5)


def test_nothing_is_longer_than_the_model_can_read(tiny_model, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"question": "red " * 900, "answer": "#### 7"}, {"question": "3 + 4?", "answer": "#### 7"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = opened(tiny_model, train=(str(path),), eval=(str(path),), max_length=4096, scoring="both", max_new_tokens=5)
    assert "1 longer than 512 tokens" in task.summary()
    assert max(len(row["input_ids"]) for row in task.train.rows) == 512
    scores = task.evaluate(task.load_model(), progress=False)
    assert (scores.counts["shortened"], scores.counts["answers"]) == (1, 2)
    greedy = opened(tiny_model, eval=(str(path),), scoring="generated", max_new_tokens=600)
    with pytest.raises(EvaError, match=r"data\.max_new_tokens is 600, but the model reads 512 tokens in all"):
        _ = greedy.held_out  # read before any training
    path.write_text('{"text": "red"}\n')
    with pytest.raises(EvaError, match=r"no written answer can be judged; set data\.scoring to likelihood"):
        _ = opened(tiny_model, eval=(str(path),), scoring="both").held_out


def test_a_tokenizer_without_padding_token(tiny_model, tiny_data):
    task = opened(tiny_model, eval=(str(tiny_data / "test.jsonl"),), scoring="both", max_new_tokens=4)
    model = task.load_model()
    expected = task.evaluate(model, progress=False)
    task.tokenizer.pad_token = None
    found = task.evaluate(model, progress=False)
    assert found.outcomes["nll"] == pytest.approx(expected.outcomes["nll"], rel=1e-5)
    assert [row["written"] for row in found.examples] == [row["written"] for row in expected.examples]


def test_examples_of_which_nothing_learned_is_left_are_dropped(tiny_model, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "red " * 100, "completion": "never reached"}, {"prompt": "a ", "completion": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = opened(tiny_model, train=(str(path),), max_length=16, truncation="right")
    assert len(task.train) == len(task.kinds()) == 1
    assert "1 longer than 16 tokens (50.0%), 1 of them dropped: nothing that is learned was left" in task.summary()
    assert task.facts()["train_emptied"] == 1
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(EvaError, match="nothing that is learned stands within the first 16 tokens of any example"):
        _ = opened(tiny_model, train=(str(path),), max_length=16, truncation="right").train
