"""Models without weights: made from a configuration alone, with every parameter on the meta device."""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evatune.errors import EvaError, near_misses


def model_folder(model: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True) -> Path:
    """Return the local folder of a model, downloaded from the hub where it is a hub id.

    Args:
        model: hub id, local folder, GGUF file or `package:NAME`, as for `evatune.models.load_model`.
        revision: branch, tag or commit of a hub model.
        weights: fetch the safetensors too, and not the configuration alone.

    Raises:
        EvaError: there is no such model.
    """
    from huggingface_hub import snapshot_download

    from evatune.models.calls import explained
    from evatune.models.sources import find_source

    found = find_source(model, None, dtype=None, revision=revision)
    if isinstance(found, Path):
        return found
    patterns = ["*.json", "*.py", *(["*.safetensors"] if weights else [])]
    with explained(found, "model"):
        return Path(snapshot_download(found, revision=revision, allow_patterns=patterns))


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the configuration of the model in a folder."""
    from transformers import AutoConfig

    from evatune.models.calls import explained

    with explained(folder, "configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def empty_model(
    config: Any,
    *,
    dtype: torch.dtype | None = None,
    head: str | None = None,
    trust_remote_code: bool = False,
    context: AbstractContextManager[Any] | None = None,
) -> nn.Module:
    """Return the model of a configuration, in evaluation mode, with parameters on the meta device.

    Buffers that are not weights (rotary frequencies, position numbers) are real, since no file holds them.

    Args:
        config: a transformers configuration; not changed.
        dtype: of the parameters; by default that of the configuration.
        head: as for `evatune.models.load_model`; by default the architecture that the configuration names.
        trust_remote_code: run Python code that comes with a hub model.
        context: another context that keeps tensors from taking memory, in which the model is made.

    Raises:
        EvaError: the model is quantized, or its class is unknown.
    """
    import transformers
    from accelerate import init_empty_weights

    from evatune.models.calls import check_choice
    from evatune.models.loading import HEADS

    if getattr(config, "quantization_config", None):
        raise EvaError(
            "the model is stored quantized, and its weights cannot be read in parts; load it whole and use `measure`."
        )
    config = copy.deepcopy(config)
    if dtype is not None:
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
    names = getattr(config, "architectures", None) or []
    with context or init_empty_weights(include_buffers=False):
        if head is not None:
            check_choice("head", head, HEADS)
            auto = getattr(transformers, HEADS[head])
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
        elif names and hasattr(transformers, names[0]):
            model = getattr(transformers, names[0])._from_config(config)
        else:
            raise EvaError(
                f"the configuration names {names[0] if names else 'no architecture'!r}"
                f"{near_misses(names[0], dir(transformers)) if names else ''}, which transformers does not have; "
                f"give head, one of {', '.join(HEADS)}."
            )
    return model.eval()
