"""Loading and saving pretrained models and their tokenizers."""

from __future__ import annotations

from evatune.models.loading import load_config, load_model, load_tokenizer
from evatune.models.saving import save_model

__all__ = ["load_config", "load_model", "load_tokenizer", "save_model"]
