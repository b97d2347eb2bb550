"""Generation reads prompts as training did: one template for both, kept with the adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evatune.cli.main import main
from evatune.errors import EvaError
from evatune.recipe import Recipe
from evatune.tasks import open_task
from evatune.training import finetune
from evatune.training.writing import open_writer


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """Return a function that trains one step on rows and returns the adapter's folder and the recipe."""

    def train(rows: list[dict]) -> tuple[Path, Recipe]:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = Recipe.from_dict(
            {
                "model": str(tiny_model),
                "data": str(tmp_path / "train.jsonl"),
                "adapter": {"method": "lora", "rank": 2},
                "train": {"steps": 1, "batch_size": 1},
                "output": str(tmp_path / "run"),
            }
        )
        finetune(recipe, progress=False)
        return tmp_path / "run" / "adapter", recipe

    return train


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add one and two.", "output": "3"}, "Add one and two."),
        ({"question": "1 + 1?", "answer": "2"}, "1 + 1?"),
        ({"prompt": "Say: ", "completion": "hello"}, "Say: "),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}, "hi"),
        ({"instruction": "Is it?\n\nAnswer format: a/b", "output": "a", "answer": "a"}, "Is it?\n\nAnswer format: a/b"),
    ],
)
def test_the_model_reads_at_inference_what_it_read_in_training(adapter, row, prompt):
    folder, recipe = adapter([row])
    written = open_writer(adapter=folder).write(prompt, max_new_tokens=2)
    task = open_task(recipe.task, recipe.data, model=recipe.model, seed=0)
    (example,) = task.examples
    assert written.prompt == example.prompt
    # The very tokens, up to the last one, which may be another where the completion follows without a blank.
    n_prompt = next(index for index, label in enumerate(task.train[0]["labels"]) if label != -100)
    ids = task.tokenizer(written.prompt, add_special_tokens=example.special_tokens)["input_ids"]
    assert ids[: n_prompt - 1] == task.train[0]["input_ids"][: n_prompt - 1]


def test_raw_and_other_adapters(adapter, tiny_model):
    folder, _ = adapter([{"question": "1 + 1?", "answer": "2"}])
    assert open_writer(adapter=folder, raw=True).write("hi", max_new_tokens=1).prompt == "hi"
    (folder / "prompt.json").unlink()  # an adapter of another library
    assert open_writer(adapter=folder).write("hi", max_new_tokens=1).prompt == "<user> hi</s><assistant> "
    assert open_writer(str(tiny_model)).write("hi", max_new_tokens=1).prompt == "<user> hi</s><assistant> "


def test_examples_with_several_templates_leave_none(adapter, tmp_path):
    folder, recipe = adapter([{"question": "1 + 1?", "answer": "2"}])
    (tmp_path / "more.jsonl").write_text('{"prompt": "Say: ", "completion": "hello"}\n')
    data = replace(recipe.data, train=(*recipe.data.train, str(tmp_path / "more.jsonl")))
    finetune(replace(recipe, data=data), overwrite=True, progress=False)
    assert not (folder / "prompt.json").exists()


def test_json_tells_the_prompt(adapter, capsys):
    folder, _ = adapter([{"question": "1 + 1?", "answer": "2"}])
    assert main(["generate", "2 + 2?", "--adapter", str(folder), "--max-new-tokens", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompt"].endswith("### Instruction:\n2 + 2?\n\n### Response: Let's think step by step.\n")
    assert told["tokens"] == 1


def test_the_command_reads_the_revision_that_it_is_told(monkeypatch, capsys):
    asked = {}

    def opened(model, **where):
        asked.update(where)
        raise EvaError("far enough")

    monkeypatch.setattr("evatune.training.writing.open_writer", opened)
    assert main(["generate", "hi", "--model", "a/model", "--revision", "v2"]) == 1
    assert asked["revision"] == "v2" and "far enough" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
    ],
)
def test_values_out_of_range(tiny_model, options, message):
    from evatune.training.writing import check_options

    values = {"prompt": "hi", "max_new_tokens": 1, "temperature": 0.0, "top_p": 1.0} | options
    with pytest.raises(EvaError, match=message):
        check_options(**values)
