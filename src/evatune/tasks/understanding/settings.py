"""The `data:` section of recipes whose task is understanding."""

from __future__ import annotations

from dataclasses import dataclass

from evatune.settings import number
from evatune.tasks.settings import RowSettings


@dataclass(frozen=True, kw_only=True)
class UnderstandingData(RowSettings):
    """Texts, or pairs of texts, and their classes; the columns are `text`, `text_pair` and `label`."""

    max_length: int = number(128, low=8)
    """Longest sequence in tokens; what is longer loses its end."""
