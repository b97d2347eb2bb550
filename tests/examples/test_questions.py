"""The example of questions: spans that are checked, articles that are in one file, and what is left out."""

from __future__ import annotations

import json

import pytest

from evatune.tasks.examples import gather
from evatune.tasks.understanding.question_answering import QuestionAnswering
from evatune.tasks.understanding.settings import UnderstandingData


@pytest.fixture
def module(example):
    return example("questions")


def row(passage: str, *answers: str, title: str = "Ada", question: str = "Who?") -> dict:
    query = f"Title: {title}\nBackground: {passage}\nQuestion: {question}\nAnswer:"
    return {"id": passage[:9], "title": title, "query": query, "answers_text": list(answers)}


def test_the_files_of_the_package_are_what_the_task_reads(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["questions.py", "--output", str(tmp_path)])
    module.main()
    told = capsys.readouterr().out
    assert f"{tmp_path}/squad/dev.jsonl: 261 questions about 210 passages of 12 articles" in told
    assert "left out: 4 whose answer is not in the passage" in told
    seen = {}
    for name in ("train", "dev"):
        path = tmp_path / "squad" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        seen[name] = {row["context"] for row in rows}, {row["title"] for row in rows}
        for row in rows:
            for text, begin in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
                assert row["context"][begin : begin + len(text)] == text
        read = gather(path, lambda first, _, file: QuestionAnswering(data=UnderstandingData()).converter(first, file))
        assert sorted(asked.question for asked in read) == sorted(row["question"] for row in rows)
    assert all(not learned & scored for learned, scored in zip(seen["train"], seen["dev"], strict=True))


def test_an_answer_stands_there_as_whole_words(module):
    written = module.as_squad(row("In 1923 it was 23.\nSo they say.", "23", "23"))
    assert written["answers"] == {"text": ["23"], "answer_start": [15]}
    assert (written["context"], written["question"]) == ("In 1923 it was 23.\nSo they say.", "Who?")
    assert module.places("(a+b)", "f(a+b) = (a+b).") == [9]
    assert module.as_squad(row("In 1923.", "23")) is None
    assert module.as_squad(row("In 1923.", "1923", "23")) is None
    assert module.as_squad(row("In 1923.", "")) is None
    assert module.as_squad(row("In 1923.")) is None
    assert module.as_squad(row("In 1923.", "1923") | {"query": "1923?"}) is None


def test_what_is_left_out_is_counted(module):
    twice = "Ada and Ada."
    rows = [row(twice, "Ada", title="scored"), row("Bob.", "Ada", title="scored"), row("Both.", "Both", title="scored")]
    rows += [row(twice + " Yes.", "Ada", title="learned"), row("Bob ran.", "Bob", title="learned")]
    rows += [row("Both.", "Both", title="learned too")]
    train, held_out, left_out = module.split(rows)
    assert [row["context"] for row in train] == ["Bob ran.", "Both."]
    assert [row["context"] for row in held_out] == [twice]
    assert held_out[0]["answers"]["answer_start"] == [0]
    assert left_out == {
        "whose answer is not in the passage": 1,
        "to learn from, whose answer is there more than once": 1,
        "to score on, whose passage is learned from": 1,
    }
