"""What an adapter starts from: one method a file, each a pure function of tensors."""

from __future__ import annotations

from evatune.initialization.eva import eva
from evatune.initialization.eva_minor import eva_minor
from evatune.initialization.lora_one import lora_one
from evatune.initialization.milora import milora
from evatune.initialization.scramble import permuted, random_rows, rotated, shuffled

__all__ = ["eva", "eva_minor", "lora_one", "milora", "permuted", "random_rows", "rotated", "shuffled"]
