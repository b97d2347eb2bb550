"""A journal keeps what was found, tells other evaluations apart, and survives a line that was cut."""

from __future__ import annotations

import pytest

from evatune.errors import EvaError
from evatune.tasks.journal import Journal


def test_what_was_found_is_known_again(tmp_path):
    path = tmp_path / "deep" / "outcomes.part"
    with Journal.open(path, about={"model": "a"}) as journal:
        journal.add("score", [(3, {"nll": 1.5}), (1, {"nll": 2.5})])
        journal.add("write", [(3, "text\nof two lines")])
    with Journal.open(path, about={"model": "a"}, resume=True) as journal:
        assert journal.known("score") == {3: {"nll": 1.5}, 1: {"nll": 2.5}}
        assert journal.known("write") == {3: "text\nof two lines"}
        assert journal.known("other") == {}
        journal.add("score", [(0, {"nll": 0.5})])
    with Journal.open(path, about={"model": "a"}, resume=True) as journal:
        assert sorted(journal.known("score")) == [0, 1, 3]


def test_a_line_that_was_cut_is_dropped(tmp_path):
    path = tmp_path / "outcomes.part"
    with Journal.open(path, about=1) as journal:
        journal.add("score", [(0, 1.0)])
        journal.add("score", [(1, 1.0)])
    path.write_bytes(path.read_bytes()[:-5])
    with Journal.open(path, about=1, resume=True) as journal:
        assert journal.known("score") == {0: 1.0}
        journal.add("score", [(1, 2.0)])
    with Journal.open(path, about=1, resume=True) as journal:
        assert journal.known("score") == {0: 1.0, 1: 2.0}


def test_what_was_kept_is_never_half_there(tmp_path, monkeypatch):
    path = tmp_path / "outcomes.part"
    with Journal.open(path, about=1) as journal:
        journal.add("score", [(0, 1.0)])
    before = path.read_bytes()

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(EvaError, match="no space left on device"):
        Journal.open(path, about=1, resume=True)
    assert path.read_bytes() == before


def test_another_evaluation_is_an_error_and_without_resume_a_new_beginning(tmp_path):
    path = tmp_path / "outcomes.part"
    Journal.open(path, about={"model": "a"}).__exit__()
    with pytest.raises(EvaError, match="is of another evaluation"):
        Journal.open(path, about={"model": "b"}, resume=True)
    with Journal.open(path, about={"model": "b"}) as journal:
        assert journal.known("score") == {}


def test_without_a_file_it_only_remembers():
    journal = Journal()
    journal.add("score", [(0, 1)])
    assert journal.known("score") == {0: 1}
