"""Figures and tables of spectra: how ranks move with ρ and metric, how measurements converge and agree."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping

import numpy as np

from evatune.allocation import RankPlan
from evatune.analyses.subspaces import similarity
from evatune.errors import EvaError
from evatune.exhibits.view import View
from evatune.report import comparisons
from evatune.report.figures import explained_variance_curves, rank_maps
from evatune.report.grid import locate
from evatune.report.style import Figure
from evatune.settings.measuring import Metric
from evatune.spectra import Spectra
from evatune.tables import Table, number


def maps(view: View) -> Figure:
    """Draw ranks and their changes for each ρ."""
    return rank_maps(list(_plans(view).values()))


def variance(view: View) -> Figure:
    """Draw how much of the variance of each input its first components explain."""
    return explained_variance_curves(_first(view))


def budget(view: View) -> Table:
    """Return the mean rank of each kind of matrix and the trainable parameters, for each ρ."""
    plans = _plans(view)
    columns = {f"ρ={value:g}": _by_matrix(plan) for value, plan in plans.items()}
    rows = _rows(columns)
    rows.append(["trainable parameters", *(plan.n_parameters for plan in plans.values())])
    rows.append(["components", *(sum(plan.ranks.values()) for plan in plans.values())])
    caption = f"Mean rank over layers; uniform ranks have {next(iter(plans.values())).uniform_parameters:,} parameters."
    return Table(name="budget", headers=["matrix", *columns], rows=rows, caption=caption)


def metrics(view: View) -> Table:
    """Return the mean rank of each kind of matrix for each metric of explained variance."""
    spectra, columns = _first(view), {}
    for metric in typing.get_args(Metric):
        plan = spectra.plan(settings=dataclasses.replace(view.plan_settings, metric=metric))
        columns[metric] = _by_matrix(plan)
    return Table(name="metrics", headers=["matrix", *columns], rows=_rows(columns), caption="Mean rank over layers.")


def convergence(view: View) -> Figure:
    """Draw the share of inputs that had converged over the time that measuring took, for each folder of spectra."""
    curves = {}
    for label, spectra in view.spectra.items():
        entries = [entry for entry in spectra.history if "done" in entry]
        seconds = [0.0, *(entry["seconds"] for entry in entries)]
        shares = [0.0, *(entry["done"] / entry["inputs"] for entry in entries)]
        if entries:
            curves[label] = (seconds, shares, shares, shares)
    return comparisons.bands(curves, x="seconds", y="share of inputs that are done", title="Time to convergence")


def similar(view: View) -> Figure:
    """Draw the mean overlap of the leading components between folders of spectra."""
    if len(view.spectra) < 2:
        raise EvaError("similarity is that of two measurements at least; give their folders, one after the other.")
    rank = view.plan_settings.rank
    n = rank if isinstance(rank, int) else max(rank.values())
    values = similarity(list(view.spectra.values()), n_components=n)
    return comparisons.matrix(
        np.asarray(values), list(view.spectra), title=f"First {n} components", name="overlap, mean over inputs"
    )


def _plans(view: View) -> dict[float, RankPlan]:
    spectra = _first(view)
    return {value: spectra.plan(settings=dataclasses.replace(view.plan_settings, rho=value)) for value in view.rhos}


def _first(view: View) -> Spectra:
    return next(iter(view.spectra.values()))


def _by_matrix(plan: RankPlan) -> dict[str, float]:
    kinds: dict[str, list[int]] = {}
    for name, place in locate(plan.ranks).items():
        kinds.setdefault(place.column, []).append(plan.ranks[name])
    return {kind: float(np.mean(ranks)) for kind, ranks in kinds.items()}


def _rows(columns: Mapping[str, Mapping[str, float]]) -> list[list[object]]:
    kinds = list(next(iter(columns.values())))
    return [[kind, *(number(column[kind], ".1f") for column in columns.values())] for kind in kinds]
