"""Saving models as ordinary folders, also those that were loaded from GGUF."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from evatune.errors import EvaError
from evatune.files import replace_folder
from evatune.models.calls import no_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a model, also one that was loaded from GGUF, as an ordinary folder of configuration and safetensors.

    Transformers refuses to save a model that it loaded from GGUF, although its weights are plain floats. This
    function puts the same tensors (no copies) into a model of the same class without the quantization entry and saves
    that model.
    Tied weights stay tied. The given model is not changed.

    Args:
        model: a transformers model.
        directory: folder to write; it appears only when it is complete.
        tokenizer: saved into the same folder.
        overwrite: replace a folder that exists.

    Returns:
        The folder.

    Raises:
        EvaError: the folder exists or cannot be written, or the model is quantized otherwise or carries an adapter.
    """
    if hasattr(model, "peft_config"):
        raise EvaError("this model carries an adapter; merge it first (model.merge_and_unload()) or save the adapter.")
    method = getattr(getattr(model, "quantization_method", None), "value", None)
    if method not in (None, "gguf"):
        raise EvaError(f"cannot save a model quantized with {method}; load it in float32, bfloat16 or float16.")
    with replace_folder(os.fspath(directory), holds="config.json", overwrite=overwrite) as folder, no_progress_bars():
        (_without_quantization(model) if method else model).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(directory)


def _without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same class that holds the same tensors and no quantization entry."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.generation_config = model.generation_config
    return plain
