"""Statistics of the outcomes of single examples, for many resamples at once.

SciPy and scikit-learn compute the same numbers for one sample at a time, which is too slow for thousands of resamples.

Legend: ... resamples, n examples. The last axis is that of the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np


def mean(values_n: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean."""
    return np.mean(values_n, axis=axis)


def ratio(above_n: np.ndarray, below_n: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the ratio of two sums; 0 where both are 0."""
    return np.sum(above_n, axis=axis) / np.maximum(np.sum(below_n, axis=axis), 1e-300)


def pearson(expected_n: np.ndarray, given_n: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return Pearson's correlation; 0 where one side is constant."""
    first_n, second_n = (values - np.mean(values, axis=axis, keepdims=True) for values in (expected_n, given_n))
    scale = np.sqrt(np.sum(first_n**2, axis=axis) * np.sum(second_n**2, axis=axis))
    return np.sum(first_n * second_n, axis=axis) / np.where(scale > 0, scale, np.inf)


def spearman(expected_n: np.ndarray, given_n: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return Spearman's correlation, that of the ranks; equal values share their mean rank."""
    from scipy.stats import rankdata

    return pearson(rankdata(expected_n, axis=axis), rankdata(given_n, axis=axis), axis=axis)


def matthews(expected_n: np.ndarray, given_n: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return Matthews' correlation of two or more classes; 0 where one side has one class only.

    Args:
        expected_n: numbers of the right classes.
        given_n: numbers of the predicted classes.
        axis: that of the examples.
    """
    agree = np.mean(expected_n == given_n, axis=axis)
    chance = first = second = np.zeros_like(agree)
    for right, predicted in _shares(expected_n, given_n, axis=axis):
        chance, first, second = chance + right * predicted, first + right**2, second + predicted**2
    scale = np.sqrt(np.maximum((1 - first) * (1 - second), 0))
    return np.where(scale > 1e-9, agree - chance, 0) / np.maximum(scale, 1e-9)


def f1(expected_n: np.ndarray, given_n: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the F1 score of class 1; 0 where it is neither right nor predicted."""
    both = np.sum((expected_n == 1) & (given_n == 1), axis=axis)
    return 2 * both / np.maximum(np.sum(expected_n == 1, axis=axis) + np.sum(given_n == 1, axis=axis), 1)


def macro_f1(expected_n: np.ndarray, given_n: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean of the F1 scores of all classes that are right or predicted."""
    total = present = np.zeros(np.shape(np.sum(expected_n, axis=axis)))
    for number in _classes(expected_n, given_n):
        one = f1(expected_n == number, given_n == number, axis=axis)
        total = total + one
        present = present + np.any((expected_n == number) | (given_n == number), axis=axis)
    return total / np.maximum(present, 1)


def mean_of_groups(values_n: np.ndarray, groups_n: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean over groups of the mean in each; a group that a resample has nothing of is left out there.

    Args:
        values_n: what is averaged.
        groups_n: the number of each example's group.
        axis: that of the examples.
    """
    members = [groups_n == group for group in np.unique(groups_n)]
    sizes = np.stack([np.sum(member, axis=axis) for member in members])
    means = np.stack([np.sum(values_n * member, axis=axis) for member in members]) / np.maximum(sizes, 1)
    return np.sum(means, axis=0) / np.sum(sizes > 0, axis=0)


def _classes(expected_n: np.ndarray, given_n: np.ndarray) -> np.ndarray:
    return np.union1d(expected_n, given_n)


def _shares(expected_n: np.ndarray, given_n: np.ndarray, *, axis: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the share of each class among the right and among the predicted classes."""
    for number in _classes(expected_n, given_n):
        yield np.mean(expected_n == number, axis=axis), np.mean(given_n == number, axis=axis)


STATISTICS: dict[str, Callable[..., np.ndarray]] = {
    "mean": mean,
    "ratio": ratio,
    "pearson": pearson,
    "spearman": spearman,
    "matthews": matthews,
    "f1": f1,
    "macro_f1": macro_f1,
    "mean_of_groups": mean_of_groups,
}
"""Functions of columns of outcomes, along one axis, by name."""
