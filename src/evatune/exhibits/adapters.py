"""Figures and tables of adapters before and after training; the sweep must have kept them."""

from __future__ import annotations

import numpy as np

from evatune.analyses.movement import Movement, movement, update_cosines
from evatune.exhibits.view import View
from evatune.report import comparisons
from evatune.report.style import Figure
from evatune.tables import Table


def moved(view: View) -> Table:
    """Return how far training moved the adapters of each method, means over targets and seeds."""
    rows = [
        [method, *(f"{np.mean([getattr(one, name) for one in found]):.4f}" for name in _COLUMNS), len(found)]
        for method, found in _movements(view).items()
    ]
    caption = f"Means over targets and seeds, {view.one_task}. A after training is compared with A before."
    return Table(name="movement", headers=["method", *_COLUMNS.values(), "seeds"], rows=rows, caption=caption)


def moved_figure(view: View) -> Figure:
    """Draw the cosine of A before and after training of each method."""
    means = {method: float(np.mean([one.cosine for one in found])) for method, found in _movements(view).items()}
    return comparisons.bars(means, x="cosine of A before and after", title=f"Movement of A, {view.one_task}")


def updates(view: View) -> Figure:
    """Draw the cosines of the trained updates B A between methods, first seed."""
    last = {method: pairs[0][1] for method, pairs in view.adapters(view.one_task).items()}
    values = np.abs(np.asarray(update_cosines(last)))
    return comparisons.matrix(values, list(last), title=f"Trained updates, {view.one_task}", name="|cosine| of B A")


_COLUMNS = {
    "spectral_norm": "spectral norm of the change of A",
    "cosine": "cosine of A",
    "product_norm": "spectral norm of B A",
}


def _movements(view: View) -> dict[str, list[Movement]]:
    return {
        method: [movement(before, after) for before, after in pairs]
        for method, pairs in view.adapters(view.one_task).items()
    }
