"""How wide a sketch is: its first width, how it grows, and when the exact second moment is the better choice."""

from __future__ import annotations

import math

N_PROBES = 8
"""Columns that only serve to estimate what the others miss. With s of them, the estimate of the residuals of k
components has a relative deviation of √(2 / (s k))."""

SPARE = 96
"""Spare columns with which a sketch begins: all columns, probes included, minus one for each component.

With 48, sketches of SmolLM2's inputs missed up to 1e-3 of the variance of the first half of 32 components and 6e-3 of
the variance of all 32; what they miss with 96 is in `benchmarks/results/accuracy.json`.
"""

TILE = 16
"""Widths, probes counted, are multiples of this: matrix units multiply in tiles of 16 columns of bfloat16."""

WIDEST = 4
"""A sketch gets at most this many times as many spare columns as it began with."""

GROWTH = 1 / 2
"""The number of spare columns grows by this power of the ratio of what a sketch misses to what it may miss."""

EXACT_UP_TO = 2048
"""Up to this many features the exact second moment may replace a sketch; it then takes at most 16 MiB in float32."""


def is_narrow(n_features: int) -> bool:
    """Tell whether the exact second moment of this many features may replace a sketch."""
    return n_features <= EXACT_UP_TO


def sketch_width(n_components: int, n_features: int) -> int:
    """Return with how many columns, beside the probes, a sketch of these components of these features begins."""
    return min(n_features, _in_tiles(n_components + SPARE - N_PROBES))


def widest_sketch(n_components: int, n_features: int) -> int:
    """Return how many columns, beside the probes, such a sketch has at most."""
    width = sketch_width(n_components, n_features)
    most = n_features // 4
    if is_narrow(n_features) and 2 * width > most:
        return width
    return max(width, min(_in_tiles(n_components + WIDEST * (width - n_components)), most))


def wider_sketch(width: int, *, excess: float, n_components: int, n_features: int) -> int:
    """Return the new width of a sketch that misses `excess` times as much as it may."""
    spare = math.ceil(excess**GROWTH * (width - n_components))
    return min(_in_tiles(n_components + spare), widest_sketch(n_components, n_features))


def _in_tiles(width: int) -> int:
    """Round a width up, so that with the probes it is a multiple of `TILE`."""
    return -(-(width + N_PROBES) // TILE) * TILE - N_PROBES
