"""The table of all runs, in groups to which the numbers of other tables lead."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evatune.compare.board import Board
from evatune.compare.choosing import score
from evatune.compare.results import RUNS, Record
from evatune.compare.standing import shown_point, title_of
from evatune.exhibits.view import View
from evatune.report.page import row_id
from evatune.tables import Group, Table, linked, number

NAME = "runs"
EVERYTHING = f"#table-{NAME}"
"""Where a number leads that all runs are behind."""


def behind(records: Sequence[Record]) -> str:
    """Return where a number leads that runs of one setting and stage are behind; empty if there are none."""
    if not records:
        return ""
    return "#" + row_id(NAME, records[0]["name"] if len(records) == 1 else _set_of(records[0]))


def behind_method(board: Board, method: str, tasks: Sequence[str] | None = None) -> str:
    """Return where a number over tasks leads, all of them by default: to the test runs of the first; others follow."""
    rows = (board.at(method, task) for task in (board.tasks if tasks is None else tasks))
    return next((href for row in rows if row and (href := behind(row.records))), "")


def behind_point(view: View, choice: dict[str, Any], point: dict[str, Any]) -> str:
    """Return where the validation score of a setting leads."""
    name = (choice["task"], choice["model"], choice["method"])
    return behind([one for one in view.runs.get((*name, "validation"), ()) if one["point"] == point])


def table(view: View, folder: Path) -> Table:
    """Return all runs, those of a method together: its test runs, then the settings that were tried.

    Args:
        view: the results.
        folder: of the page, from which runs that have a folder of their own are linked.
    """
    rows: list[list[object]] = []
    groups: list[Group] = []
    for name, title, records in _groups(view):
        groups.append(Group(name=name, title=title, n_rows=len(records)))
        for record in records:
            path = view.results.folder / RUNS / record["name"] / "run.json"
            href = Path(os.path.relpath(path, folder)).as_posix() if path.is_file() else ""
            value = score(record, view.metric) if record["state"] == "done" else None
            shown = None if value is None else number(value, ".4f")
            name_cell = linked(record["name"], href)
            rows.append([name_cell, record["state"], shown, record["wall_seconds"], record.get("started")])
    headers = ["run", "state", "score", "seconds", "started"]
    return Table(headers=headers, rows=rows, groups=groups, name=NAME)


def _groups(view: View) -> Iterator[tuple[str, str, list[Record]]]:
    """Return name, title and runs of each group; settings with a single run are one group."""
    cells = list(dict.fromkeys(key[:3] for key in view.runs))
    order = {method: place for place, method in enumerate(view.board_so_far.methods)}
    cells.sort(key=lambda cell: order.get(cell[2], len(order)))
    methods = dict.fromkeys(cell[2] for cell in cells)
    for stage, method in ((stage, method) for method in methods for stage in ("test", "validation")):
        for cell in (cell for cell in cells if cell[2] == method):
            sets: dict[str, list[Record]] = {}
            for record in view.runs.get((*cell, stage), ()):
                sets.setdefault(_set_of(record), []).append(record)
            single = [own[0] for own in sets.values() if len(own) == 1]
            title = f"{method} on {title_of(*cell[:2])}: "
            for name, own in sets.items():
                if len(own) > 1:
                    setting = shown_point(own[0]["point"])
                    yield name, f"{title}{len(own)} {stage} runs{setting and f', {setting}'}", own
            if single:
                what = f"{len(single)} {stage} runs" if len(single) > 1 else f"a {stage} run"
                yield f"{title} {stage}", title + what, single


def _set_of(record: Record) -> str:
    """Return a name of the runs that differ from this one in the seed alone."""
    return f"{re.sub('-?seed[0-9]+$', '', record['name'])} {record['stage']}"
