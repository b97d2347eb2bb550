"""Tables of a comparison: scores, intervals, differences, ranks, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from evatune.compare.board import Board
from evatune.compare.differences import LEVEL
from evatune.compare.standing import Standing, shown_point
from evatune.compare.statistics import (
    Ranking,
    interquartile_mean,
    mean_ranks,
    probability_of_improvement,
    stratified,
)
from evatune.errors import EvaError
from evatune.exhibits import runs
from evatune.exhibits.view import View
from evatune.tables import Marked, Table, linked, number, span

LONGEST_REASON = 40
"""Characters of a reason that a cell has room for."""


def scores(view: View) -> Table:
    """Return mean and standard deviation over seeds, methods × tasks, as the paper prints them (Tables 2 to 4).

    Means over the tasks of groups, over groups and over tasks follow.
    """
    board = view.board
    means = [_mean_column(board, name) for name in board.means]
    columns = [*(_column(board, task) for task in board.tasks), *means]
    before = [board.untuned(task) for task in board.tasks]
    shown = [None if value is None else linked(number(value, ".4f"), runs.EVERYTHING) for value in before]
    rows: list[list[object]] = [["untuned", None, *shown, *[None] * len(means)]]
    for method in board.methods:
        rows.append([method, _trainable(board, method), *(column.get(method) for column in columns)])
    headers = [
        f"{name} ({board.metric(name)}{'' if board.sign(name) > 0 else ', lower is better'})" for name in board.tasks
    ]
    scaled = " Means over tasks are of scores with the untuned model at 0 and the best method at 1." * board.is_scaled
    caption = f"Mean ± standard deviation over {_seeds(board)}, each method at its chosen setting.{scaled}"
    headers = ["method", "parameters", *headers, *board.means]
    caption += _of_which_parameters(board)
    caption += _missing(board) + _reasons(board.rows)
    return Table(name="scores", headers=headers, rows=rows, caption=caption)


def settings(view: View) -> Table:
    """Return what was chosen for each method on validation data, and grids whose best value is at their end."""
    rows = []
    for choice, row in zip(view.results.choices, view.board_so_far.rows, strict=True):
        shown = shown_point(row.point or {})
        ends = ", ".join(path.rpartition(".")[2] for path in row.open)
        rows.append(
            [
                row.title,
                row.method,
                linked(shown or None, runs.behind_point(view, choice, row.point or {})),
                ends or None,
                linked(f"{len(row.scores)} of {row.n_seeds}", runs.behind(row.records)),
                _why(row) if row.reason else None,
            ]
        )
    headers = ["task", "method", "chosen on validation", "open grid", "test seeds", "why missing"]
    return Table(name="settings", headers=headers, rows=rows, caption=_reasons(view.board_so_far.rows).strip())


def intervals(view: View) -> Table:
    """Return the interquartile mean of each method over all tasks and seeds, with a stratified bootstrap interval."""
    board = view.board
    found = {m: stratified(interquartile_mean, board.values(m)) for m in board.complete}
    ranked = {m: found[m].value for m in _with_all_seeds(board)}
    cells = marked({m: number(board.turn * e.value, ".4f") for m, e in found.items()}, ranked)
    rows: list[list[object]] = []
    for method, estimate in found.items():
        ends = sorted(board.turn * end for end in estimate.interval or ())
        shown = linked(cells[method], runs.behind_method(board, method))
        rows.append([method, shown, span((ends[0], ends[1]), ".4f") if ends else "one seed"])
    where = f"over {len(board.tasks)} tasks and" if len(board.tasks) > 1 else f"on {board.tasks[0]} over"
    caption = f"Interquartile mean {where} {_seeds(board)}; {_orientation(board)}."
    return Table(
        name="intervals",
        headers=["method", "interquartile mean", "95% interval"],
        rows=rows,
        caption=caption + _missing(board),
    )


def improvement(view: View) -> Table:
    """Return how probable it is that a run of each method scores higher than one of the reference."""
    board = view.board
    name = board.reference(view.against)
    _check_complete(board, name)
    rows = []
    for method in board.complete:
        if method != name:
            found = stratified(probability_of_improvement, board.values(method), board.values(name))
            rows.append(
                [
                    method,
                    linked(number(found.value, ".2f"), runs.behind_method(board, method)),
                    "one seed" if found.interval is None else span(found.interval, ".2f"),
                ]
            )
    caption = f"Probability that a run scores better than one of {name}, {_on_tasks(board)}."
    headers = ["method", f"P(better than {name})", "95% interval"]
    return Table(name="improvement", headers=headers, rows=rows, caption=caption + _missing(board))


def paired(view: View) -> Table:
    """Return the differences to the reference, paired by seed and example, with p-values corrected by Holm's method."""
    board = view.board
    name = board.reference(view.against)
    if not view.differences:
        raise EvaError(
            f"there is nothing to pair: no other method shares a seed with {name}, or the metric "
            f"({', '.join(map(board.metric, board.tasks))}) is no mean over examples; name another one with --score."
        )
    rows = [
        [
            one.task,
            one.method,
            linked(number(one.difference.estimate.value, "+.4f"), runs.behind_method(board, one.method, [one.task])),
            span(one.difference.estimate.interval or (math.nan, math.nan), "+.4f"),
            one.verdict,
            one.difference.n_seeds,
            one.difference.n_pairs,
            number(one.difference.p, ".3f"),
            number(one.p, ".3f"),
        ]
        for one in view.differences
    ]
    headers = ["task", "method", f"better than {name} by", "95% interval", "verdict", "seeds", "pairs", "p", "p (Holm)"]
    caption = (
        f"Differences of the outcomes of single examples, positive where the method is better than {name}; seeds are "
        f"resampled, then examples. Holm's correction is for all {len(rows)} comparisons of this table; below "
        f"{LEVEL:g} a method is called better or worse."
    )
    if any(one.difference.n_seeds < 2 for one in view.differences):
        caption += (
            " With one seed only examples are resampled: how much another seed would change is not in the interval."
        )
    return Table(name="paired", headers=headers, rows=rows, caption=caption)


def ranks(view: View) -> Table:
    """Return the mean rank of each method and the critical difference of Nemenyi's test."""
    board = view.board
    ranking, blocks = ranking_of(board)
    order = sorted(ranking.ranks.items(), key=lambda item: item[1])
    cells = marked({m: number(rank, ".2f") for m, rank in order}, {m: -rank for m, rank in order})
    friedman = f"Friedman's p is {ranking.p:.3g}" if math.isfinite(ranking.p) else "too few for Friedman's test"
    caption = (
        f"Mean rank over {ranking.n_blocks} {blocks}, 1 is best. Mean ranks that differ by less than "
        f"{ranking.critical_difference:.2f} cannot be told apart (Nemenyi, 5%); {friedman}."
    )
    left = [method for method in board.complete if method not in ranking.ranks]
    caption += f" Without a score for every seed: {', '.join(left)}." if left else ""
    return Table(
        name="ranks",
        headers=["method", "mean rank"],
        rows=[[m, linked(cells[m], runs.behind_method(board, m))] for m, _ in order],
        caption=caption + _missing(board),
    )


def ranking_of(board: Board) -> tuple[Ranking, str]:
    """Return the ranks of the complete methods, and what they are taken over: tasks, or seeds where tasks are few.

    Over seeds, a method that has fewer of them than another one is left out, since all share each block.

    Raises:
        EvaError: fewer than two methods are complete, or they share no seed.
    """
    needed = "ranks need two methods with scores on every task, and a seed that was run with all of them."
    if len(board.complete) < 2:
        raise EvaError(needed)
    if len(board.tasks) >= 5:
        means = {m: [float(task.mean()) for task in board.values(m)] for m in board.complete}
        return mean_ranks(means), "tasks"
    ranked = _with_all_seeds(board)
    if len(ranked) < 2:
        raise EvaError(needed)
    shared = [
        sorted(set.intersection(*(set(row.scores) for m in ranked if (row := board.at(m, task)))))
        for task in board.tasks
    ]
    by_block = {
        m: [
            board.sign(task) * row.scores[seed]
            for task, seeds in zip(board.tasks, shared, strict=True)
            if (row := board.at(m, task))
            for seed in seeds
        ]
        for m in ranked
    }
    if not any(by_block.values()):
        raise EvaError(needed)
    return mean_ranks(by_block), "pairs of task and seed" if len(board.tasks) > 1 else "seeds"


def _with_all_seeds(board: Board) -> list[str]:
    """Return the complete methods that have as many scores as any of them."""
    counts = {m: sum(map(len, board.values(m))) for m in board.complete}
    return [m for m, count in counts.items() if count == max(counts.values())]


def wins(view: View) -> Table:
    """Return how often each method scores higher than, as high as and lower than the reference, by task and seed."""
    board = view.board
    name = board.reference(view.against)
    _check_complete(board, name)
    rows = []
    for method in (method for method in board.methods if method != name):
        counts = [0, 0, 0]
        for task in board.tasks:
            ours, theirs = board.at(method, task), board.at(name, task)
            if ours and theirs:
                for seed in set(ours.scores) & set(theirs.scores):
                    difference = board.sign(task) * (ours.scores[seed] - theirs.scores[seed])
                    counts[1 if difference == 0 else 0 if difference > 0 else 2] += 1
        if sum(counts):
            rows.append([method, linked(counts[0], runs.behind_method(board, method)), *counts[1:]])
    caption = f"Runs with the same task and seed as one of {name}."
    return Table(name="wins", headers=["method", "wins", "ties", "losses"], rows=rows, caption=caption)


def marked(cells: Mapping[str, Marked], values: Mapping[str, float]) -> dict[str, Marked]:
    """Return cells with those of the highest and the second highest value marked; equal values share a mark."""
    order = sorted(set(values.values()), reverse=True)
    names: tuple[Literal["best", "second"], ...] = ("best", "second")
    marks = dict(zip(order, names, strict=False)) if len(values) > 1 else {}
    return {
        name: replace(cell, mark=marks[values[name]]) if values.get(name) in marks else cell
        for name, cell in cells.items()
    }


def _column(board: Board, task: str) -> dict[str, object]:
    """Return the cells of one task; a method without scores says why."""
    cells: dict[str, Marked] = {}
    means = {}
    for method in board.methods:
        row = board.at(method, task)
        if row is None:
            continue
        if row.mean is None:
            cells[method] = _why(row)
            continue
        text = f"{row.mean:.4f}" + (f" ± {row.deviation:.4f}" if row.deviation is not None else "")
        if len(row.scores) < row.n_seeds:  # not marked beside methods with all of theirs
            text = f"{text} ({len(row.scores)} of {row.n_seeds} seeds)"
        else:
            means[method] = board.sign(task) * row.mean
        cells[method] = Marked(row.mean, text=text, also={"deviation": row.deviation, "seeds": len(row.scores)})
    return {m: linked(cell, runs.behind_method(board, m, [task])) for m, cell in marked(cells, means).items()}


def _mean_column(board: Board, name: str) -> dict[str, object]:
    """Return the cells of a mean over tasks."""
    mean, tasks = board.means[name], board.tasks_of(name)
    rows = {m: [row for task in tasks if (row := board.at(m, task))] for m in mean}
    whole = {m: value for m, value in mean.items() if all(len(row.scores) >= row.n_seeds for row in rows[m])}
    cells = marked({m: number(value, ".4f") for m, value in board.shown_means[name].items()}, whole)
    return {m: linked(cell, runs.behind_method(board, m, tasks)) for m, cell in cells.items()}


def _trainable(board: Board, method: str) -> object:
    """Return the trainable parameters of a method on the first task on which it was run."""
    rows = (board.at(method, task) for task in board.tasks)
    row = next((row for row in rows if row is not None and row.trainable is not None), None)
    return None if row is None else linked(row.trainable, runs.behind(row.records))


def _of_which_parameters(board: Board) -> str:
    """Return a sentence where a method has other parameters on other tasks, as with other heads or models."""
    counts = {(row.method, row.trainable) for row in board.rows if row.trainable is not None}
    is_one = len(counts) == len({method for method, _ in counts})
    return "" if is_one else f" Parameters are those on {board.tasks[0]}, or else on a method's first task."


def _seeds(board: Board) -> str:
    counts = sorted({len(row.scores) for row in board.rows if row.scores})
    if counts == [1]:
        return "one seed, so without deviation"
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def _on_tasks(board: Board) -> str:
    return f"mean over {len(board.tasks)} tasks" if len(board.tasks) > 1 else f"on {board.tasks[0]}"


def _orientation(board: Board) -> str:
    if board.is_scaled:
        return "the untuned model is at 0 and the best method at 1"
    return f"{'higher' if board.sign(board.tasks[0]) > 0 else 'lower'} is better"


def _missing(board: Board) -> str:
    left = [method for method in board.methods if method not in board.complete]
    if len(left) > 5:
        return f" {len(left)} methods have no score on every task and are left out."
    return f" Without a score on every task: {', '.join(left)}." if left else ""


def _why(row: Standing) -> Marked:
    """Return the cell that says why scores are missing; readers find a long reason below the table (`_reasons`)."""
    return Marked(row.reason, text=row.reason if len(row.reason) <= LONGEST_REASON else "see below")


def _reasons(rows: Sequence[Standing]) -> str:
    """Return the reasons that are too long for a cell, each with the methods and tasks that have it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if len(row.reason) > LONGEST_REASON:
            found.setdefault(row.reason, []).append(f"{row.method} on {row.title}")
    return "".join(f" No scores of {', '.join(where)}: {reason}" for reason, where in found.items())


def _check_complete(board: Board, name: str) -> None:
    """Check that there is something to compare with a method."""
    if name not in board.complete or len(board.complete) < 2:
        raise EvaError(
            f"{name} and one more method need scores on every task to be compared; see `evatune table settings`."
        )
