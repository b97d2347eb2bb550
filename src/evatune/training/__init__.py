"""Training an adapter with transformers' `Trainer`, and the record of what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evatune.training.adalora import AdaLoraCallback
    from evatune.training.callbacks import JsonLinesCallback, RequireEva
    from evatune.training.record import RunRecord
    from evatune.training.run import finetune

__all__ = ["AdaLoraCallback", "JsonLinesCallback", "RequireEva", "RunRecord", "finetune"]

_HOME = {
    "AdaLoraCallback": "adalora",
    "JsonLinesCallback": "callbacks",
    "RequireEva": "callbacks",
    "RunRecord": "record",
    "finetune": "run",
}


def __getattr__(name: str) -> object:
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
