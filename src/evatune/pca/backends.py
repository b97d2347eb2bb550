"""The backends of `StreamingPCA` by name, and which one "auto" takes."""

from __future__ import annotations

from evatune.pca.backend import State
from evatune.pca.exact import ExactState
from evatune.pca.incremental import IncrementalState
from evatune.pca.leading import LeadingState
from evatune.pca.sketch import SketchState
from evatune.pca.widths import is_narrow, sketch_width

STATES: dict[str, type[State]] = {
    state.name: state
    for state in (
        ExactState,
        SketchState,
        IncrementalState,
        LeadingState,
    )
}
"""A row for each backend."""

AUTO = "auto"
BACKENDS = (AUTO, *(name for name, state in STATES.items() if state.is_offered))
"""What users may ask for."""

WORTH_A_SKETCH = 2
"""A sketch is worth it where the rows are more than this many times as wide as the sketch: its two products then cost
less than two thirds of the one product of the exact backend (`benchmarks/scaling.py`)."""


def choose_backend(backend: str, n_components: int, n_features: int) -> type[State]:
    """Return the class of state to use when `backend` was asked for; "auto" depends on both numbers."""
    width = sketch_width(n_components, n_features)
    if backend == SketchState.name and width == n_features:
        return ExactState  # a sketch as wide as the rows would only be less precise
    if backend != AUTO:
        return STATES[backend]
    return ExactState if is_narrow(n_features) or n_features <= WORTH_A_SKETCH * width else SketchState
