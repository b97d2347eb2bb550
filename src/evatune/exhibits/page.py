"""The page of a sweep's results: tables, figures with their numbers, every run, and what failed."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path

from evatune.compare.choosing import score
from evatune.compare.results import RUNS, Record
from evatune.compare.standing import title_of
from evatune.errors import EvaError
from evatune.exhibits import FIGURES, TABLES, make
from evatune.exhibits.view import View
from evatune.report.page import Block, Folded, Heading, Picture, Section, row_id, write_page
from evatune.tables import Marked, Table

OVERALL = ("scores", "intervals", "improvement", "paired", "ranks", "wins", "settings", "costs")
BY_TASK = {"rates": "rates", "loss": "steps", "parameters": "scores", "first-gradient": None, "rho": None}
"""Figures of each task, with the table that has their numbers."""
HOW = """
Each method runs at the setting that was best for it on validation data, or at the only one that the sweep gives it; the
scores are of test data that no choice has seen. Standard deviations and intervals are over seeds. A score leads to its
runs. `evatune table` and `evatune figure` make everything on this page one by one.
"""


def write_results_page(view: View, path: str | Path) -> Path:
    """Write the page of a folder of results.

    Args:
        view: the folder.
        path: the file; it appears only when it is complete.

    Raises:
        EvaError: there are no results.
    """
    results, board = view.results, view.board
    records = list(results.records.values())
    counts = Counter(record["state"] for record in records)
    missing = sum(choice["missing"] for choice in results.choices)
    methods = ", ".join(board.methods) if len(board.methods) <= 5 else f"{len(board.methods)} methods"
    lead = f"{methods} on {', '.join(board.tasks)}: " + ", ".join(
        f"{count} runs {state}" for state, count in counts.items()
    )
    lead += f"; {missing} are still to be done, so this is a part of the comparison." if missing else "."
    overall: list[Block] = [HOW]
    for name in OVERALL:
        if table := _table(view, name):
            idea = TABLES[name].idea
            overall += [Heading(text=f"{idea[0].upper()}{idea[1:]}"), table]
    sections = [Section(title="Scores", content=[*overall, *_figure(view, "critical-difference", None)])]
    for task in board.tasks:
        one = view.on(task)
        content = [block for name, numbers in BY_TASK.items() for block in _figure(one, name, numbers)]
        sections.append(Section(title=task, content=content))
    sections.append(Section(title="What failed", content=[_failed(records)]))
    sections.append(Section(title="All runs", content=[_runs(view, records, Path(path).parent)]))
    sections.append(Section(title="What was run", content=[_facts(records)]))
    return write_page(path, title=f"Comparison: {results.folder.name}", lead=lead, sections=sections)


def _table(view: View, name: str) -> Table | None:
    """Return a table whose scores lead to their runs; None if these results have none of it."""
    table = _made(view, name)
    if table is None or name != "scores":
        return table
    tasks = dict(enumerate(view.board.tasks, start=2))  # by their columns
    rows = [
        [_linked(view, row[0], tasks[column], cell) if column in tasks else cell for column, cell in enumerate(row)]
        for row in table.rows
    ]
    return dataclasses.replace(table, rows=rows)


def _made(view: View, name: str) -> Table | None:
    try:
        return make(TABLES[name], view)
    except EvaError:  # such as a comparison with LoRA, where it was not run
        return None


def _linked(view: View, method: object, task: str, cell: object) -> object:
    standing = view.board.at(str(method), task)
    if standing is None or not standing.records:
        return cell
    href = "#" + row_id("runs", standing.records[0]["name"])
    return dataclasses.replace(cell, href=href) if isinstance(cell, Marked) else Marked(cell, href=href)


def _figure(view: View, name: str, numbers: str | None) -> list[Block]:
    try:
        figure = make(FIGURES[name], view)
    except EvaError:  # such as the score over rho, where there is one value
        return []
    table = _rates(view) if numbers == "rates" else None if numbers is None else _made(view, numbers)
    idea = FIGURES[name].idea
    blocks: list[Block] = [
        Picture(figure=figure, alt=f"{idea}, {view.task or 'all tasks'}.", caption=f"{idea[0].upper()}{idea[1:]}.")
    ]
    if table is not None:
        blocks.append(Folded(title="numbers", table=dataclasses.replace(table, name="")))
    return blocks


def _rates(view: View) -> Table:
    rows = []
    for choice in view.results.choices:
        if title_of(choice["task"], choice["model"]) == view.one_task:
            for point, value in choice["curve"]:
                setting = ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in point.items())
                rows.append([choice["method"], setting, f"{value:.4f}"])
    return Table(headers=["method", "setting", "score on validation data"], rows=rows)


def _failed(records: list[Record]) -> Table | str:
    rows = [[r["name"], r["state"], r["tries"], r["reason"]] for r in records if r["state"] != "done"]
    return Table(headers=["run", "state", "tries", "why"], rows=rows) if rows else "Nothing."


def _runs(view: View, records: list[Record], folder: Path) -> Table:
    """Return all runs; a run's own record is linked from the folder of the page."""
    rows = []
    for record in records:
        path = view.results.folder / RUNS / record["name"] / "run.json"
        name = record["name"]
        shown = Marked(name, href=Path(os.path.relpath(path, folder)).as_posix()) if path.is_file() else name
        value = score(record, view.metric) if record["state"] == "done" else None
        rows.append([shown, record["stage"], record["state"], value, record["wall_seconds"], record.get("started")])
    return Table(headers=["run", "stage", "state", "score", "seconds", "started"], rows=rows, name="runs")


def _facts(records: list[Record]) -> Table:
    done = [record for record in records if record["state"] == "done"]
    machines = dict.fromkeys(
        f"{r['machine']['processor']}, {r['machine']['threads']} threads" for r in done if r.get("machine")
    )
    codes = dict.fromkeys(r["fingerprints"]["code"] for r in done if r.get("fingerprints"))
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in done)
    rows: list[list[object]] = [
        ["machine", "; ".join(machines) or None],
        ["versions", "; ".join(versions)],
        ["sources of evatune (hash)", ", ".join(codes) or None],
        ["time of all runs", f"{sum(r['wall_seconds'] for r in records) / 3600:.1f} hours"],
    ]
    return Table(headers=["", ""], rows=rows)
