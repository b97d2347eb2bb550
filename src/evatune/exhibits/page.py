"""The page of a sweep's results: tables, figures with their numbers, every run, and what failed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np

from evatune.compare.board import Board
from evatune.compare.results import Record
from evatune.compare.standing import shown_point, title_of
from evatune.errors import EvaError
from evatune.exhibits import FIGURES, TABLES, make, runs
from evatune.exhibits.short import headline
from evatune.exhibits.view import View
from evatune.report.page import Block, Folded, Heading, Picture, Section, write_page
from evatune.tables import Marked, Table, linked, number

OVERALL = ("scores", "paired", "intervals", "improvement", "ranks", "wins", "settings", "costs")
BY_TASK = {"rates": "rates", "loss": "steps", "parameters": "scores", "first-gradient": None, "rho": None}
"""Figures of each task, with the table that has their numbers."""
HOW = """
Each method runs at the setting that was best for it on validation data, or at the only one that the sweep gives it;
the scores are of test data that no choice has seen. Standard deviations and intervals are over seeds. The best number
of a column is bold, the second best underlined. On a screen, what has a dotted line leads to the runs behind the
numbers of its row; where they are over several tasks, to the runs on the first one, below which are those on the
others. `evatune table` and `evatune figure` make everything on this page one by one.
"""


def write_results_page(view: View, path: str | Path) -> Path:
    """Write the page of a folder of results.

    Args:
        view: the folder.
        path: the file; it appears only when it is complete.

    Raises:
        EvaError: there are no results.
    """
    board = view.board_so_far if view.board_so_far.rows else view.board
    records = list(view.results.records.values())
    scores = _scores(view)  # first, since it computes the differences that the views of single tasks share
    short = [block for task in board.tasks for block in _short(view.on(task))]
    sections = [Section(title="In short", content=short)] if short else []
    sections.append(Section(title="Scores", content=scores))
    for task in board.tasks:
        one = view.on(task)
        content = [block for name, numbers in BY_TASK.items() for block in _figure(one, name, numbers)]
        sections.append(Section(title=task, content=content))
    sections.append(Section(title="What failed", content=[_failed(records)]))
    sections.append(Section(title="All runs", content=[runs.table(view, Path(path).parent)]))
    sections.append(Section(title="What was run", content=[_facts(records)]))
    return write_page(path, title=f"Comparison: {view.results.folder.name}", lead=_lead(view), sections=sections)


def _lead(view: View) -> str:
    """Return what was compared, and how much of it is done."""
    results, board = view.results, view.board_so_far
    methods = ", ".join(board.methods) if len(board.methods) <= 5 else f"{len(board.methods)} methods"
    counts = Counter(record["state"] for record in results.records.values())
    lead = f"{methods} on {', '.join(board.tasks)}: " + ", ".join(
        f"{count} runs {state}" for state, count in counts.items()
    )
    missing = sum(choice["missing"] for choice in results.choices)
    lead += f"; {missing} are still to be done, so this is a part of the comparison." if missing else "."
    if not any(row.scores for row in board.rows):
        lead += " No test run is done yet: what follows was scored on validation data alone."
    return lead


def _short(view: View) -> list[Block]:
    """Return what the comparison says of one task; nothing if no method has a score."""
    title, numbers = headline(view)
    return [Heading(text=title), numbers, *_figure(view, "differences", None)] if title else []


def _scores(view: View) -> list[Block]:
    """Return the tables of all tasks, and how methods rank."""
    blocks: list[Block] = [HOW]
    for name in OVERALL:
        if table := _table(view, name):
            blocks += [Heading(text=TABLES[name].title), table]
    return [*blocks, *_figure(view, "critical-difference", None)]


def _table(view: View, name: str) -> Table | None:
    """Return a table, scores with the best method first; None if these results have none of it."""
    table = _made(view, name)
    if table is None or name != "scores":
        return table
    board = view.board
    order = {method: place for place, method in enumerate(sorted(board.methods, key=lambda m: -_overall(board, m)))}
    return dataclasses.replace(table, rows=sorted(table.rows, key=lambda row: order.get(str(row[0]), -1)))


def _overall(board: Board, method: str) -> float:
    """Return a method's mean over tasks, higher is better; one without a score on each of them is last."""
    return float(np.mean([task.mean() for task in board.values(method)])) if method in board.complete else -math.inf


def _made(view: View, name: str) -> Table | None:
    try:
        return make(TABLES[name], view)
    except EvaError:  # such as a comparison with LoRA, where it was not run
        return None


def _figure(view: View, name: str, numbers: str | None) -> list[Block]:
    try:
        figure = make(FIGURES[name], view)
    except EvaError:  # such as the score over rho, where there is one value
        return []
    table = _rates(view) if numbers == "rates" else None if numbers is None else _made(view, numbers)
    alt = f"{FIGURES[name].idea}, {view.task or 'all tasks'}."
    blocks: list[Block] = [Picture(figure=figure, alt=alt, caption=f"{FIGURES[name].title}.")]
    if table is not None:
        blocks.append(Folded(title="numbers", table=dataclasses.replace(table, name="")))
    return blocks


def _rates(view: View) -> Table:
    rows = []
    for choice in view.results.choices:
        if title_of(choice["task"], choice["model"]) == view.one_task:
            for point, value in choice["curve"]:
                shown = linked(number(value, ".4f"), runs.behind_point(view, choice, point))
                rows.append([choice["method"], shown_point(point), shown])
    return Table(headers=["method", "setting", "score on validation data"], rows=rows)


def _failed(records: list[Record]) -> Table | str:
    rows = [
        [Marked(r["name"], href=runs.behind([r])), r["state"], r["tries"], r["reason"]]
        for r in records
        if r["state"] != "done"
    ]
    return Table(headers=["run", "state", "tries", "why"], rows=rows) if rows else "Nothing."


def _facts(records: list[Record]) -> Table:
    done = [record for record in records if record["state"] == "done"]
    machines = dict.fromkeys(
        f"{r['machine']['processor']}, threads: {r['machine']['threads']}" for r in done if r.get("machine")
    )
    codes = dict.fromkeys(r["fingerprints"]["code"] for r in done if r.get("fingerprints"))
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in done)
    rows: list[list[object]] = [
        ["machine", "; ".join(machines) or None],
        ["versions", "; ".join(versions)],
        ["sources of evatune (hash)", ", ".join(codes) or None],
        [
            "time of all runs",
            Marked(f"{sum(r['wall_seconds'] for r in records) / 3600:.1f} hours", href=runs.EVERYTHING),
        ],
    ]
    return Table(headers=["", ""], rows=rows)
