"""The results that are kept in this repository: they are read, small, and name no machine's folders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evatune.compare.results import Results
from evatune.exhibits import scores
from evatune.exhibits.view import View

ROOT = Path(__file__).parents[2] / "results" / "compare"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/records.jsonl"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_are_made_of_them(folder):
    view = View(folders=(str(folder),))
    records = Results(folder).records.values()
    is_scored = any(record["stage"] == "test" for record in records)
    table = scores.scores(view) if is_scored else scores.settings(view)
    assert len(table.rows) >= 3
    assert {record["state"] for record in records} <= {"done", "refused", "failed"}
    text = (folder / "records.jsonl").read_text(encoding="utf-8")
    assert not re.search(r'"/(tmp|home|root|work|Users)/', text)


def test_all_of_them_are_small():
    assert FOLDERS
    assert sum(path.stat().st_size for path in ROOT.rglob("*.json*")) < 5 * 2**20
