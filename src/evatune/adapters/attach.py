"""Adapters on disk: saving one, and putting a saved one on a model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES

from evatune.adapters.base_change import base_change, convert_saved, load_start
from evatune.errors import EvaError
from evatune.files import check_tensors, replace_folder


def load_adapter(model: Any, directory: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on a model.

    Args:
        model: the base model that the adapter was made for.
        directory: what `save_pretrained` wrote.
        is_trainable: make it ready for training. If the adapter was saved with `convert=False`, this changes the base
            weights.

    Raises:
        EvaError: the folder holds no adapter, or one for another model.
    """
    if not (Path(directory) / "adapter_config.json").is_file():
        raise EvaError(f"{directory} holds no adapter: it has no adapter_config.json.")
    check_tensors(directory)
    try:
        with quiet_peft():
            if is_trainable and (started := load_start(model, directory)) is not None:
                return started
            return PeftModel.from_pretrained(model, directory, is_trainable=is_trainable)
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise EvaError(f"the adapter in {directory} does not fit this model: {reason[:300]}") from error


def save_adapter(model: PeftModel, directory: str | Path, *, overwrite: bool = False, convert: bool = True) -> Path:
    """Write an adapter for the untouched base model as PEFT does, complete or not at all, and without a README.

    If the method changed the base weights, the adapter is converted to one of twice the rank, which gives the same
    outputs on the original base weights.

    Args:
        model: the model with the adapter.
        directory: the folder to write.
        overwrite: replace a folder that exists.
        convert: if false, the adapter is written as it is. Only `load_adapter` with `is_trainable=True` can load it: it
            changes the base weights again, and training continues from there.

    Raises:
        EvaError: the folder exists or cannot be written.
    """
    with replace_folder(directory, holds="adapter_config.json", overwrite=overwrite) as folder, quiet_peft():
        with without_card(model):
            model.save_pretrained(str(folder), save_embedding_layers=saved_embeddings(model))
        if convert and (change := base_change(model)) is not None:
            convert_saved(model, folder, change)
    return Path(directory)


def saved_embeddings(model: PeftModel) -> bool | str:
    """Return what PEFT is to save of embeddings and of the head of a language model.

    It would write their frozen weights into the adapter where they are targets, though nothing has changed them.
    """
    targets = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return False if any(path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for path in targets) else "auto"


@contextlib.contextmanager
def without_card(model: PeftModel) -> Iterator[None]:
    """Let PEFT write no README, which would be an empty form."""
    vars(model)["create_or_update_model_card"] = lambda output_dir: None
    try:
        yield
    finally:
        del vars(model)["create_or_update_model_card"]


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence useless warnings of PEFT.

    They tell of its own deprecated calls, that `package:` models are on no hub, that its AdaLoRA keeps the ranks that
    were found in a place where other adapters have none, and of shared weights, of which `evatune.adapters.wrap` tells.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer is part of")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Could not find a config file in package:")
        warnings.filterwarnings("ignore", message=r"The following rank_pattern keys did not match any .*\.lora_E'")
        yield
