"""How similar two measurements are: overlap of the spans of their components.

Letters: k components, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.spectra import Spectra


def overlap(first_kd: Tensor, second_kd: Tensor) -> float:
    """Return the mean squared cosine of the principal angles of two spans: 1 for equal ones, 0 for orthogonal ones.

    Args:
        first_kd: orthonormal rows.
        second_kd: orthonormal rows; the smaller number of rows counts.
    """
    product = first_kd.double() @ second_kd.double().T
    return float(product.square().sum() / min(product.shape))


def similarity(measured: Sequence[Spectra], *, n_components: int = 16) -> Tensor:
    """Return the mean overlap of the leading components over all inputs, for each pair of measurements (Figure 11).

    Args:
        measured: spectra of one model.
        n_components: leading components that are compared.

    Returns:
        A symmetric matrix (n, n).

    Raises:
        EvaError: the measurements have no input in common.
    """
    keys = [key for key in measured[0].inputs if all(key in spectra.inputs for spectra in measured)]
    if not keys:
        raise EvaError("these spectra have no input in common, so they are of different models.")

    def mean_overlap(one: int, other: int) -> float:
        pairs = ((measured[one].inputs[key], measured[other].inputs[key]) for key in keys)
        return fmean(overlap(a.components[:n_components], b.components[:n_components]) for a, b in pairs)

    return symmetric(len(measured), mean_overlap)


def symmetric(n: int, value: Callable[[int, int], float]) -> Tensor:
    """Return a matrix (n, n) with ones on its diagonal, and beside it what each pair of places has."""
    values = torch.eye(n, dtype=torch.float64)
    for one in range(n):
        for other in range(one):
            values[one, other] = values[other, one] = value(one, other)
    return values
