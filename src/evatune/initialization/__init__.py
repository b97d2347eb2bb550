"""What an adapter starts from: one method a file, each a pure function of tensors."""

from __future__ import annotations

from evatune.initialization.eva import eva

__all__ = ["eva"]
