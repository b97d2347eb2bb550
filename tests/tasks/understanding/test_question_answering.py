"""Extractive question answering: windows over long contexts, the best span, and SQuAD's rules of agreement."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from tests.on_device import TRAINED_BY_TRAINER
from transformers import AutoTokenizer

from evatune.errors import EvaError
from evatune.tasks.understanding.answers import agreement, best_span
from evatune.tasks.understanding.question_answering import QuestionAnswering
from evatune.tasks.understanding.settings import UnderstandingData
from evatune.training import finetune

PLAIN = QuestionAnswering(data=UnderstandingData())


def asked(context: str, answer: str, **more) -> dict:
    answers = {"text": [answer], "answer_start": [context.index(answer)]}
    return {"id": "1", "title": "", "question": "which one?", "context": context, "answers": answers} | more


@pytest.fixture
def questions(write_rows):
    """Contexts whose answer is the word behind "is"."""
    chance = random.Random(0)
    rows = []
    for _ in range(96):
        before, after = (" ".join(chance.choices(["red", "blue"], k=chance.randint(1, 4))) for _ in range(2))
        rows.append(asked(f"{before} is true {after}", "true"))
    return write_rows("train.jsonl", *rows), write_rows("test.jsonl", *rows[:32])


@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_a_run_learns_answers_and_plain_peft_loads_it(recipe, questions, encoder, opened):
    from peft import PeftModel
    from transformers import AutoModelForQuestionAnswering

    train, test = questions
    data = {"kind": "question-answering", "train": [train], "eval": [test], "stride": 16}
    wanted = recipe(data=data, train={"steps": 40})
    record = finetune(wanted, progress=False)
    assert record.after["headline"] == "f1"
    assert record.after["metrics"]["exact"] > max(0.8, record.before["metrics"]["exact"])
    assert record.after["counts"]["windows"] == 32
    base = AutoModelForQuestionAnswering.from_pretrained(encoder)
    again = opened(**data).evaluate(PeftModel.from_pretrained(base, f"{wanted.output}/adapter"), progress=False)
    assert again["exact"] == record.after["metrics"]["exact"]


def test_windows_cover_a_long_context_and_one_at_least_has_the_answer(opened, write_rows):
    context = " ".join(["red"] * 80 + ["true"] + ["blue"] * 40)
    path = write_rows("long.jsonl", asked(context, "true"))
    task = opened(kind="question-answering", train=(path,), eval=(path,), max_length=48, stride=8)
    rows = task.train.rows
    assert len(rows) > 2
    assert task.train.cut == 1
    assert task.summary().endswith("places of answers, 1 longer than 48 tokens, read in several windows")
    assert all(len(row["input_ids"]) <= 48 for row in rows)
    seen = {position for row in rows for span in row["offsets"] if span for position in range(*span)}
    assert seen >= {place for place, letter in enumerate(context) if letter != " "}
    learned = [task.kind.learned(row, task.labels) for row in rows]
    assert learned.count("true") >= 1
    assert set(learned) == {"true", "not in this window"}
    scores = task.evaluate(task.load_model(), progress=False)
    assert (scores.counts["examples"], scores.counts["windows"]) == (1, len(rows))
    assert len(scores.outcomes["f1"]) == 1
    (told,) = scores.examples
    assert told["question"] == f"{context}\nwhich one?"
    assert told["expected"] == ["true"]
    assert told["right"] == (told["given"] == "true")


def test_the_loss_is_that_of_transformers(opened, questions):
    task = opened(kind="question-answering", train=(questions[0],), eval=(questions[1],), stride=16)
    model = task.load_model()
    scores = task.evaluate(model, progress=False)
    for row, nll in zip(task.held_out.rows[:5], scores.outcomes["nll"], strict=False):
        with torch.no_grad():
            assert nll == pytest.approx(float(model(**task.collate([row])).loss), rel=1e-4)


@pytest.mark.on_cpu("scores are there by then")
def test_questions_without_answer_are_learned_and_scored(opened, write_rows):
    none = asked("red blue", "red") | {"answers": {"text": [], "answer_start": []}}
    path = write_rows("none.jsonl", none)
    task = opened(kind="question-answering", train=(path,), eval=(path,), stride=8)
    row = task.train[0]
    assert (row["start_positions"], row["end_positions"]) == (0, 0)
    assert "no answer" in task.preview(1).text
    assert task.facts()["train_without_answer"] == 1
    outputs = torch.zeros(len(row["input_ids"]), 2)
    examples = [row["asked"]]
    outputs[0] = 5.0
    assert task.kind.outcomes([outputs], task.train, examples, task.labels).columns["exact"] == [1.0]
    outputs[0] = -5.0
    assert task.kind.outcomes([outputs], task.train, examples, task.labels).columns["exact"] == [0.0]


@pytest.mark.on_cpu("scores are there by then")
def test_the_best_span_is_that_of_all_pairs():
    context, chance = "ab cd ef gh", torch.Generator().manual_seed(0)
    offsets = [None, (0, 2), (3, 5), (6, 8), (9, 11), None]
    for _ in range(20):
        scores = torch.randn(6, 2, generator=chance)
        pairs = [(float(scores[i, 0] + scores[j, 1]), i, j) for i in range(1, 5) for j in range(i, 5)]
        score, i, j = max(pairs)
        found, text = best_span(scores, offsets, context)
        assert found == pytest.approx(score)
        assert text == context[offsets[i][0] : offsets[j][1]]


@pytest.mark.parametrize(
    ("given", "expected", "result"),
    [
        ("the Eiffel Tower.", ["Eiffel tower"], (1, 1)),
        ("tower", ["Eiffel tower", "the tower"], (1, 1)),
        ("in Paris", ["Paris"], (0, 2 / 3)),
        ("Rome", ["Paris"], (0, 0)),
        ("", [], (1, 1)),
        ("Paris", [], (0, 0)),
        ("", ["Paris"], (0, 0)),
    ],
)
def test_agreement_as_squad_has_it(given, expected, result):
    assert agreement(given, expected) == pytest.approx(result)


def test_rows_and_their_mistakes(opened, write_rows):
    row = asked("red is true", "true")
    convert = PLAIN.converter(row, "x")
    assert convert(row).begin == 7
    assert convert(row | {"question": " "}) is None
    with pytest.raises(EvaError, match="the answer 'true' does not stand at character 3 of its context"):
        convert(row | {"answers": {"text": ["true"], "answer_start": [3]}})
    with pytest.raises(EvaError, match="answers is 'true', but must have the lists 'text' and 'answer_start'"):
        convert(row | {"answers": "true"})
    with pytest.raises(EvaError, match="question and context must be strings"):
        convert({"question": "a"})
    with pytest.raises(EvaError, match=r"x has no column 'context'; it has question: .*\(context=NAME\)"):
        PLAIN.converter({"question": "a"}, "x")
    path = write_rows("long.jsonl", asked("red is true", "true", question="red " * 40))
    with pytest.raises(EvaError, match=r"leaves \d+ of 32 tokens for its context, but windows share 8"):
        _ = opened(kind="question-answering", train=(path,), max_length=32, stride=8).train


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": "Ada", "answer_start": 0}, "must have the lists 'text' and 'answer_start'"),
        ({"text": None, "answer_start": None}, "must have the lists"),
        ({"text": ["Ada"], "answer_start": ["0"]}, "'answer_start' whole numbers"),
        ({"text": [None], "answer_start": [0]}, "'text' must hold strings"),
    ],
)
def test_answers_in_other_forms_are_refused(answers, message):
    row = {"question": "who?", "context": "Ada wrote it.", "answers": answers}
    with pytest.raises(EvaError, match=message):
        PLAIN.converter(row, "rows")(row)


@pytest.mark.parametrize("answers", [{"text": [], "answer_start": []}, {"text": [""], "answer_start": [-1]}])
def test_no_text_is_no_answer(answers):
    row = {"question": "who?", "context": "Ada wrote it.", "answers": answers}
    example = PLAIN.converter(row, "rows")(row)
    assert (example.answers, example.begin) == ((), None)
    answers = {name: [*values, other] for (name, values), other in zip(answers.items(), ("wrote", 4), strict=True)}
    example = PLAIN.converter(row, "rows")(row | {"answers": answers})
    assert (example.answers, example.begin) == (("wrote",), 4)


def test_the_room_for_a_context_is_that_of_a_pair(opened, write_rows, encoder, tmp_path):
    """The template of a pair has two tokens more than that of one text, as RoBERTa's has."""
    tokenizer = json.loads((encoder / "tokenizer.json").read_text())
    name, number = next(iter(AutoTokenizer.from_pretrained(encoder).get_vocab().items()))
    mark = {"SpecialToken": {"id": name, "type_id": 0}}
    one, two = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [one],
        "pair": [mark, one, mark, two],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }
    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = write_rows("long.jsonl", asked(" ".join(["red"] * 80 + ["true"]), "true"))
    length = len(AutoTokenizer.from_pretrained(encoder)("which one?", add_special_tokens=False)["input_ids"])
    with pytest.raises(EvaError, match=r"leaves 8 of .* tokens for its context, but windows share 8"):
        opened(folder, kind="question-answering", train=(path,), max_length=length + 10, stride=8).train  # noqa: B018
    task = opened(folder, kind="question-answering", train=(path,), max_length=length + 11, stride=8)
    assert len(task.train.rows) > 2
