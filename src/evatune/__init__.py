"""Explained Variance Adaptation (EVA): data-driven initialization and rank allocation for LoRA.

Public names are loaded when they are first used, so that `import evatune` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evatune.activations import estimate, measure, measure_from_disk
    from evatune.adapters import initialize, initialize_lora_eva_weights, prepare
    from evatune.allocation import RankPlan
    from evatune.errors import EvaError, EvaWarning
    from evatune.pca import StreamingPCA
    from evatune.spectra import Spectra, Spectrum, Target

__version__ = "0.1.0"

_HOME = {
    "EvaError": "evatune.errors",
    "EvaWarning": "evatune.errors",
    "RankPlan": "evatune.allocation",
    "Spectra": "evatune.spectra",
    "Spectrum": "evatune.spectra",
    "StreamingPCA": "evatune.pca",
    "Target": "evatune.spectra",
    "initialize": "evatune.adapters",
    "initialize_lora_eva_weights": "evatune.adapters",
    "estimate": "evatune.activations",
    "measure": "evatune.activations",
    "measure_from_disk": "evatune.activations",
    "prepare": "evatune.adapters",
}

__all__ = [  # noqa: RUF022 - in the order of use
    "measure",
    "measure_from_disk",
    "estimate",
    "Spectra",
    "Spectrum",
    "Target",
    "RankPlan",
    "initialize",
    "initialize_lora_eva_weights",
    "prepare",
    "StreamingPCA",
    "EvaError",
    "EvaWarning",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'evatune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
