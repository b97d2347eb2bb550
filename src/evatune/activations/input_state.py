"""`InputState`: all that a measuring run knows of one input."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from evatune.pca import AnyPCA, Snapshot
from evatune.settings import Reason


@dataclass(kw_only=True, eq=False)
class InputState:
    """What a run knows of one input: its PCA, what the stopping rules compare, and why measuring it ended.

    Shapes: d features, k components.
    """

    pca: AnyPCA
    """The streaming PCA of its rows."""
    before: Snapshot | None = None
    """Its components before the last batch, if the next check compares them."""
    cosines: Tensor | None = None
    """Cosines of its components with those before the last batch, (k,), between a check and its end."""
    checked: list[Tensor] = field(default_factory=list)
    """Its components at the last checks, oldest first, each (k, d), in bfloat16: only energies along them are compared,
    which rounding changes by some 2⁻¹⁸."""
    energies: tuple[Tensor, int] | None = None
    """Energy of the rows up to the last check along `checked[-1]` and `checked[0]`, (2, k), and the number of these
    rows."""
    weighed: Tensor | None = None
    """Energy of the rows so far along each set of `checked`, (c, k), between a check and its end."""
    gain: float | None = None
    """Share of captured variance that the next doubling of the data would gain, as the last check predicted."""
    reason: Reason | None = None
    """The stopping rule that it has met."""
