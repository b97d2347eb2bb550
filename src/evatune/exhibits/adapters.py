"""Figures and tables of adapters before and after training; the sweep must have kept them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from evatune.analyses.movement import Distance, distances, read_a, update_cosines
from evatune.errors import EvaError
from evatune.exhibits.view import View
from evatune.report import comparisons
from evatune.report.grid import locate
from evatune.report.style import Figure
from evatune.tables import Marked, Table

Found = Mapping[str, Sequence[Mapping[str, Distance]]]
"""For each method, of each seed: the distance of each target."""


def moved(view: View) -> Table:
    """Return how far training moved A, by method and matrix (Table 8)."""
    caption = f"Cosine of A before and after training / spectral norm of its change, on {view.one_task}."
    return _by_matrix(_movements(view), name="movement", caption=caption)


def apart(view: View) -> Table:
    """Return how far the trained A of each method is from that of the reference, by matrix (Table 7)."""
    name = view.board.reference(view.against)
    adapters = view.adapters(view.one_task)
    if name not in adapters:
        raise EvaError(f"{name} kept no adapters on {view.one_task}; name one of {', '.join(adapters)} with --against.")
    trained = {seed: read_a(last, initial=first) for seed, (first, last) in adapters[name].items()}
    found = {}
    for method, runs in adapters.items():
        if method != name:
            own = {seed: read_a(last, initial=first) for seed, (first, last) in runs.items() if seed in trained}
            found[method] = [distances(a, trained[seed]) for seed, a in own.items() if _share_a_shape(a, trained[seed])]
    if not any(found.values()):
        raise EvaError(f"no other method shares a seed and ranks with {name} on {view.one_task}.")
    caption = f"Cosine / spectral norm of the difference of the trained A from {name}'s, same seed, on {view.one_task}."
    return _by_matrix(found, name="distance", caption=caption)


def moved_figure(view: View) -> Figure:
    """Draw the spectral norm of the change of A, mean over targets and seeds, of each method."""
    means = {
        method: float(np.mean([one.spectral_norm for targets in seeds for one in targets.values()]))
        for method, seeds in _movements(view).items()
    }
    return comparisons.bars(means, x="spectral norm of the change of A", title=f"Movement of A, {view.one_task}")


def updates(view: View) -> Figure:
    """Draw the cosines of the trained updates B A between methods, first seed that all have."""
    adapters = view.adapters(view.one_task)
    shared = set.intersection(*(set(runs) for runs in adapters.values()))
    if not shared:
        raise EvaError(f"no seed has adapters of all methods on {view.one_task}.")
    last = {method: runs[min(shared)][1] for method, runs in adapters.items()}
    values = np.abs(np.asarray(update_cosines(last)))
    return comparisons.matrix(values, list(last), title=f"Trained updates, {view.one_task}", name="|cosine| of B A")


def _movements(view: View) -> Found:
    return {
        method: [distances(read_a(first), read_a(last, initial=first)) for first, last in runs.values()]
        for method, runs in view.adapters(view.one_task).items()
    }


def _share_a_shape(first: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> bool:
    return any(name in last and last[name].shape == a.shape for name, a in first.items())


def _by_matrix(found: Found, *, name: str, caption: str) -> Table:
    """Return cosine and spectral norm, means over layers and seeds, methods × matrices."""
    targets = list(dict.fromkeys(target for seeds in found.values() for one in seeds for target in one))
    column = {target: place.column for target, place in locate(targets).items()}
    kinds = list(dict.fromkeys(column.values()))
    rows: list[list[object]] = []
    for method, seeds in found.items():
        cells = []
        for kind in kinds:
            own = [one for targets_ in seeds for target, one in targets_.items() if column[target] == kind]
            cells.append(_cell(own) if own else None)
        rows.append([method, *cells])
    return Table(name=name, headers=["method", *kinds], rows=rows, caption=f"{caption} Means over layers and seeds.")


def _cell(found: Sequence[Distance]) -> Marked:
    """Return the mean cosine and spectral norm, which programs get apart."""
    cosine = float(np.mean([one.cosine for one in found]))
    norm = float(np.mean([one.spectral_norm for one in found]))
    text = f"{cosine:z.2f} / {norm:.3g}"
    return Marked(text, also={"cosine": cosine, "spectral norm": norm})
