"""Figures of a sweep's runs: curves over steps, rates, parameters and ρ; and how many steps a method saves."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from evatune.compare.differences import of_task
from evatune.compare.results import Record
from evatune.compare.standing import Standing, title_of
from evatune.errors import EvaError
from evatune.exhibits.runs import behind
from evatune.exhibits.scores import ranking_of
from evatune.exhibits.view import View
from evatune.report import comparisons
from evatune.report.figures import series, trailing_mean
from evatune.report.style import Figure
from evatune.tables import Table, linked, number
from evatune.tasks.scores import is_better_higher
from evatune.training.folder import FREE, changed_settings

SMOOTH = 5
"""Steps that a curve over steps is the mean of."""


def loss(view: View) -> Figure:
    """Draw the training loss of each method: the mean over seeds, and the lowest and highest of them."""
    return _over_steps(view, "loss", title="Training loss", log_y=False)


def gradients(view: View) -> Figure:
    """Draw the gradient norm of each method in the same way."""
    return _over_steps(view, "grad_norm", title="Gradient norm before clipping", log_y=True)


def first_gradient(view: View) -> Figure:
    """Draw the mean gradient norm of the first step of each method."""
    norms = {
        method: [record["first_grad_norm"] for record in records if record.get("first_grad_norm") is not None]
        for method, records in view.test_runs(view.one_task).items()
    }
    means = {method: float(np.mean(values)) for method, values in norms.items() if values}
    x = "gradient norm of all that is trained, with a new head if there is one"
    return comparisons.bars(means, x=x, title=f"First step, {view.one_task}")


def rates(view: View) -> Figure:
    """Draw the validation score of each method over the learning rates that were tried."""
    curves = {}
    choices = [one for one in view.results.choices if title_of(one["task"], one["model"]) == view.one_task]
    metric = next((one["metric"] for one in choices if one.get("metric")), view.board_so_far.metric(view.one_task))
    better = max if is_better_higher(metric) else min
    for choice in choices:
        best: dict[float, float] = {}
        for point, score in choice["curve"]:
            if (rate := point.get("train.learning_rate")) is not None:
                best[rate] = better(score, best.get(rate, score))
        places = sorted(best)
        values = [best[rate] for rate in places]
        if values:
            curves[choice["method"]] = (places, values, values, values)
    return comparisons.bands(
        curves,
        x="learning rate",
        y=f"{metric} on validation data",
        title=f"Which rate, {view.one_task}",
        log_x=True,
        tick_places=True,
        against=_beside(view),
    )


def parameters(view: View) -> Figure:
    """Draw the test score of each method over its trainable parameters."""
    task = view.one_task
    points = {
        row.method: (float(row.trainable), row.mean, row.deviation or 0.0)
        for method in view.board.methods
        if (row := view.board.at(method, task)) and row.mean is not None and row.trainable
    }
    return comparisons.pareto(
        points,
        x="trainable parameters",
        y=f"{view.board.metric(task)}, ± standard deviation",
        title=f"Score over parameters, {task}",
        higher_is_better=view.board.sign(task) > 0,
    )


def rho(view: View) -> Figure:
    """Draw the test score over ρ, a curve for the methods whose settings differ in nothing else."""
    task = view.one_task
    rows = [row for method in view.board.methods if (row := view.board.at(method, task)) and row.scores]
    curves: dict[str, comparisons.Band] = {}
    for family in _families(rows):
        by_rho = {row.records[0]["recipe"]["adapter"]["rho"]: row for row in family}
        if len(by_rho) > 1:
            places = sorted(by_rho)
            means, deviations = np.array([(by_rho[one].mean, by_rho[one].deviation or 0.0) for one in places]).T
            curves[_shared_name(family, taken=curves)] = (places, means, means - deviations, means + deviations)
    if not curves:
        raise EvaError(f"no method of {task} was run with several values of rho; give the sweep `rhos: [1, 2]`.")
    y = f"{view.board.metric(task)}, ± standard deviation"
    return comparisons.bands(curves, x="ρ", y=y, title=f"Score over ρ, {task}", tick_places=True)


def differences(view: View) -> Figure:
    """Draw the difference of each method to the reference with its interval, in colour where it is beyond chance."""
    name = view.board.reference(view.against)
    compared = of_task(view.differences, view.one_task)
    if not compared:
        raise EvaError(f"there is nothing to pair with {name} on {view.one_task}.")
    return comparisons.intervals(
        {one.method: (one.difference.estimate.value, *(one.difference.estimate.interval or ())) for one in compared},
        strong=[one.method for one in compared if one.verdict in ("better", "worse")],
        zero=name,
        x=f"better than {name} by, in {view.board.metric(view.one_task)}, with 95% interval",
        title=f"Differences to {name}, {view.one_task}",
    )


def critical_difference(view: View) -> Figure:
    """Draw the mean ranks of the methods."""
    ranking, _ = ranking_of(view.board)
    return comparisons.critical_difference(ranking.ranks, ranking.critical_difference)


def steps_saved(view: View) -> Table:
    """Return the steps until the loss, mean of the last steps and over seeds, is that of the reference at its end."""
    task, name = view.one_task, view.board.reference(view.against)
    runs = view.test_runs(task)
    if name not in runs:
        raise EvaError(f"{name} has no finished test runs on {task}.")
    goal = _mean_curve(runs[name], "loss")[1][-1]
    rows = []
    for method, records in runs.items():
        steps, values, *_ = _mean_curve(records, "loss")
        reached = [int(step) for step, value in zip(steps, values, strict=True) if value <= goal]
        last = linked(number(float(values[-1]), ".4f"), behind(records))
        rows.append([method, last, reached[0] if reached else None, int(steps[-1])])
    caption = f"Training loss on {task}, mean of {SMOOTH} logged steps and of all seeds; {name} ends at {goal:.4f}."
    headers = ["method", "loss at the end", f"step at which {name}'s is reached", "steps"]
    return Table(name="steps", headers=headers, rows=rows, caption=caption)


def _families(rows: Sequence[Standing]) -> list[list[Standing]]:
    """Return the methods in groups that differ in ρ alone."""
    families: list[list[Standing]] = []
    for row in rows:
        family = next((one for one in families if _differ_in_rho_alone(one[0], row)), None)
        if family is None:
            families.append([row])
        else:
            family.append(row)
    return families


def _differ_in_rho_alone(first: Standing, second: Standing) -> bool:
    """Return whether the settings of two methods are the same but for ρ and what was searched for each."""
    free = FREE | {"adapter.rho", "train.seed", *(first.point or ()), *(second.point or ())}
    return not changed_settings(first.records[0]["recipe"], second.records[0]["recipe"], free=free)


def _shared_name(family: Sequence[Standing], *, taken: Collection[str]) -> str:
    """Return the words that the names of all methods have, or else all names."""
    names = [row.method for row in family]
    shared = " ".join(word for word in names[0].split() if all(word in name.split() for name in names))
    return shared if shared and shared not in taken else ", ".join(names)


def _over_steps(view: View, key: str, *, title: str, log_y: bool) -> Figure:
    curves = {method: _mean_curve(records, key) for method, records in view.test_runs(view.one_task).items()}
    return comparisons.bands(
        {method: curve for method, curve in curves.items() if len(curve[0])},
        x="optimizer step; the bands are from the lowest to the highest seed",
        y=f"{title.lower()}, mean of {SMOOTH} entries",
        title=f"{title}, {view.one_task}",
        log_y=log_y,
        against=_beside(view),
    )


def _beside(view: View) -> str | None:
    """Return the method that each panel of a figure shows beside its own, if the sweep has the reference."""
    try:
        return view.board_so_far.reference(view.against)
    except EvaError:
        return None


def _mean_curve(records: Sequence[Record], key: str) -> comparisons.Band:
    """Return the smoothed curve of runs: mean, lowest and highest over the runs, at the steps that all logged."""
    curves = [series(record["log"], key) for record in records]
    shared = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in curves)))
    values = np.array([trailing_mean(values, SMOOTH)[np.isin(steps, shared)] for steps, values in curves])
    return shared, values.mean(axis=0), values.min(axis=0), values.max(axis=0)
