"""Reading data: formats, files, order, and what cannot be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from evatune.errors import EvaError
from evatune.models import load_tokenizer
from evatune.tasks.generation.example import Example
from evatune.tasks.generation.examples import load_examples

QUESTION = {
    "instruction": "Which one is a colour?\n\nAnswer1: red Answer2: two\n\nAnswer format: answer1/answer2",
    "input": "",
    "output": "the correct answer is answer1",
    "answer": "answer1",
}


def write_jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_commonsense(tmp_path):
    (example,) = load_examples(write_jsonl(tmp_path / "a.jsonl", QUESTION))
    assert example.prompt == QUESTION["instruction"] + "\n"
    assert example.completion == QUESTION["output"]
    assert example.choices == ("the correct answer is answer1", "the correct answer is answer2")
    assert example.answer == 0


def test_an_answer_that_is_not_listed_is_an_error_that_names_the_row(tmp_path):
    odd = QUESTION | {"output": "the correct answer is answer5", "answer": "answer5"}
    with pytest.raises(EvaError, match=r"a\.jsonl.*2.*'answer5', but must be one of answer1"):
        load_examples(write_jsonl(tmp_path / "a.jsonl", QUESTION, odd))


def test_commonsense_without_listed_choices_has_no_question(tmp_path):
    unlisted = QUESTION | {"instruction": "Which is it?"}
    (example,) = load_examples(write_jsonl(tmp_path / "a.jsonl", unlisted))
    assert example.answer is None
    assert example.completion == unlisted["output"]


@pytest.mark.parametrize(
    ("row", "prompt_part", "completion"),
    [
        ({"question": "1 + 1?", "answer": "#### 2"}, "### Instruction:\n1 + 1?\n\n### Response:", "#### 2"),
        ({"query": "1 + 1?", "response": "two"}, "### Instruction:\n1 + 1?\n\n### Response:", "two"),
        ({"prompt": "Say: ", "completion": "hello"}, "Say: ", "hello"),
        ({"text": "Once upon a time"}, "", "Once upon a time"),
    ],
)
def test_other_formats(tmp_path, row, prompt_part, completion):
    (example,) = load_examples(write_jsonl(tmp_path / "a.jsonl", row))
    assert prompt_part in example.prompt
    assert example.completion == completion
    assert example.text == example.prompt + completion
    assert example.answer is None


def test_messages_learn_every_turn_of_the_assistant(tmp_path, tiny_model):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao"), ("user", "?")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,) = load_examples(write_jsonl(tmp_path / "a.jsonl", row), tokenizer=load_tokenizer(tiny_model))
    assert example.pieces == (
        ("<user> hi</s><assistant> ", False),
        ("hello</s>", True),
        ("<user> bye</s><assistant> ", False),
        ("ciao</s>", True),
    )
    assert example.prompt.endswith("bye</s><assistant> ")
    assert example.completion == "ciao</s>"


def test_messages_need_a_chat_template(tmp_path, tiny_model):
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    tokenizer = load_tokenizer(tiny_model)
    with pytest.raises(EvaError, match="1 row without a question or an answer"):
        load_examples(path, tokenizer=tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(EvaError, match="need a tokenizer with a chat template"):
        load_examples(path, tokenizer=tokenizer)


def test_template_that_rewrites_the_past_is_refused(tmp_path, tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(EvaError, match="rewrites earlier turns"):
        load_examples(write_jsonl(tmp_path / "a.jsonl", row), tokenizer=tokenizer)


def test_every_file_type_gives_the_same(tmp_path):
    rows = [{"prompt": f"say {n}, please: ", "completion": f"{n}"} for n in range(5)]
    expected = [example.text for example in load_examples(write_jsonl(tmp_path / "a.jsonl", *rows))]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.json", "b.json", "a.csv", "a.tsv", "a.parquet"):
        assert [example.text for example in load_examples(tmp_path / name)] == expected, name


def test_order_depends_on_the_seed_alone(tmp_path):
    rows = [{"prompt": "p", "completion": str(number)} for number in range(50)]
    one = write_jsonl(tmp_path / "one.jsonl", *rows[:25])
    two = write_jsonl(tmp_path / "two.jsonl", *rows[25:])
    first = load_examples([one, two], seed=3)
    assert first.items == load_examples([one, two], seed=3).items
    assert first.items != load_examples([one, two], seed=4).items
    assert load_examples([one, two], seed=3, limit=7).items == first.items[:7]
    assert {example.completion for example in first} == {str(number) for number in range(50)}
    assert {int(example.completion) < 25 for example in first[:10]} == {True, False}  # mixed


def test_dropped_rows_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", QUESTION, QUESTION | {"output": ""}, QUESTION | {"answer": None})
    examples = load_examples(path)
    assert (len(examples), examples.dropped) == (1, 2)
    assert examples.summary() == "1 examples from a.jsonl (2 without a question or an answer dropped)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.json", '{"text": 1}', "must hold a list of objects"),
        ("a.json", '{"a": [{"text": "a"}], "b": []}', "or one object in which there is one such list"),
        ("a.json", "[", r"a\.json is not JSON: Expecting value at line 1, column 2"),
        ("a.parquet", "no parquet", r"cannot read .*a\.parquet"),
        ("a.txt", "hello", "its ending must be one of"),
        ("a.jsonl", '{"txt": "a"}\n', "has the fields txt, which fit no known format"),
        ("a.jsonl", "", "holds no rows at all"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(EvaError, match=message):
        load_examples(tmp_path / name)


def test_the_file_of_a_folder_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", QUESTION)
    write_jsonl(tmp_path / "b.jsonl", {"question": "a", "reply": "b"})
    nearest = r"gsm8k lacks answer; boolq lacks passage, answer; completion lacks prompt, completion"
    message = rf"^\S+b\.jsonl has the fields question, reply, which fit no known format \({nearest}\); say with columns"
    with pytest.raises(EvaError, match=message):
        load_examples(tmp_path)


def test_rows_without_a_prompt_are_dropped(tmp_path):
    rows = [{"prompt": prompt, "completion": " b"} for prompt in ("a", "", " ", None)]
    examples = load_examples(write_jsonl(tmp_path / "a.jsonl", *rows, {"completion": " b"}))
    assert (len(examples), examples.dropped) == (1, 4)


def test_a_list_inside_an_object_of_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": "1.1", "data": [{"text": "a"}]}))
    assert [example.completion for example in load_examples(tmp_path / "a.json")] == ["a"]


def test_missing_sources(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", QUESTION)
    with pytest.raises(EvaError, match=r"no data file .*trian\.jsonl \(did you mean 'train\.jsonl'"):
        load_examples(tmp_path / "trian.jsonl")
    assert len(load_examples(tmp_path)) == 1  # a folder means its files
    with pytest.raises(EvaError, match="no file fits the pattern"):
        load_examples(tmp_path / "*.csv")
    with pytest.raises(EvaError, match=r"lacks query, response of format 'metamath'"):
        load_examples(tmp_path / "train.jsonl", format="metamath")
    with pytest.raises(EvaError, match="no data format 'mathmeta'"):
        load_examples(tmp_path / "train.jsonl", format="mathmeta")


def test_example_needs_nothing_but_pieces():
    assert Example(pieces=(("a", False), ("b", True))).text == "ab"


@pytest.mark.parametrize("name", ["ARC-Easy", "ARC-Challenge", "boolq", "openbookqa", "piqa", "winogrande"])
def test_real_questions(real_data, name):
    examples = load_examples(real_data(f"commonsense/{name}/test.json"))
    with_choices = [example for example in examples if example.answer is not None]
    assert examples.dropped == 0
    assert len(with_choices) > 0.99 * len(examples)
    assert all(example.completion == example.choices[example.answer] for example in with_choices)


def test_real_mathematics(real_data):
    assert len(load_examples(real_data("gsm8k/test.jsonl"))) == 1319
