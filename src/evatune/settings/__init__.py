"""Every option, declared once: frozen dataclasses whose fields carry their range and, under them, their text.

The Python calls, the recipe, the command line, the run's record and saved spectra share these. This package imports
nothing but the standard library and `evatune.errors`, so that `evatune --help` does not wait for PyTorch.
"""

from evatune.settings.adapter import Adapter, Gradients, Preparing
from evatune.settings.engine import EngineSettings
from evatune.settings.measuring import (
    IGNORED_LABEL,
    Decomposition,
    Measuring,
    Planning,
    Ranking,
    Rows,
    Stopping,
    Targets,
    check_kept,
    max_components,
)
from evatune.settings.reasons import Reason
from evatune.settings.section import Section, convert, describe_kind, field_docs, field_types, number, same_as, takes
from evatune.settings.training import TrainSettings

__all__ = [
    "IGNORED_LABEL",
    "Adapter",
    "Decomposition",
    "EngineSettings",
    "Gradients",
    "Measuring",
    "Planning",
    "Preparing",
    "Ranking",
    "Reason",
    "Rows",
    "Section",
    "Stopping",
    "Targets",
    "TrainSettings",
    "check_kept",
    "convert",
    "describe_kind",
    "field_docs",
    "field_types",
    "max_components",
    "number",
    "same_as",
    "takes",
]
