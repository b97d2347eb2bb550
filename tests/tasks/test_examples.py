"""Gathering examples: where mistakes stand, and what is printed of sources."""

from __future__ import annotations

import pytest

from evatune.errors import EvaError
from evatune.tasks.examples import Examples, gather


def converter(row, source, file):
    def convert(row):
        if row["n"] == "bad":
            raise EvaError("n is bad.")
        return None if row["n"] is None else row["n"]

    return convert


def test_mistakes_in_a_row_name_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": "bad"}\n')
    with pytest.raises(EvaError, match=r"a\.jsonl, line 2: n is bad\."):
        gather(tmp_path / "a.jsonl", converter)


def test_rows_without_an_answer_are_dropped_with_a_count(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": null}\n{"n": 2}\n')
    found = gather(tmp_path / "a.jsonl", converter)
    assert (sorted(found), found.dropped) == ([1, 2], 1)
    (tmp_path / "a.jsonl").write_text('{"n": null}\n')
    with pytest.raises(EvaError, match=r"holds no usable example \(1 row without a question or an answer\)"):
        gather(tmp_path / "a.jsonl", converter)


def test_a_share_to_choose_by_is_the_same_for_every_seed_and_never_trained_on(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(50)))
    parts = {
        (part, seed): gather(tmp_path / "a.jsonl", converter, part=part, share=0.3, seed=seed).items
        for part in ("training", "validation")
        for seed in (0, 1)
    }
    assert len(parts["validation", 0]) == 15
    assert sorted(parts["training", 0] + parts["validation", 0]) == list(range(50))
    for part in ("training", "validation"):
        assert parts[part, 0] != parts[part, 1] and sorted(parts[part, 0]) == sorted(parts[part, 1])


def test_files_of_one_name_are_told_apart():
    found = Examples(items=(1, 2), sources=("data/easy/train.json", "data/hard/train.json", "more.json"))
    assert found.summary() == "2 examples from easy/train.json, hard/train.json, more.json"


def test_a_source_that_is_named_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    with pytest.raises(EvaError, match=r"a\.jsonl is named twice, so its examples would count double"):
        gather([tmp_path / "a.jsonl"] * 2, converter)
