"""A saved adapter for programs that can only read one rank and one alpha.

Mixed ranks are ordinary PEFT, but not every server reads `rank_pattern` and `alpha_pattern`. The export pads `A` with
rows of zeros and `B` with columns of zeros, and multiplies the scale into `B`: B A stays the same, and no pattern is
needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from evatune.adapters.attach import quiet_peft, saved_embeddings, without_card
from evatune.adapters.factors import Factors, factors_of, layers_of
from evatune.adapters.lora import check_layers, find_adapter
from evatune.errors import EvaError
from evatune.files import replace_folder

_BASE_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` for which an adapter belongs to the base model as it was."""


def export_portable(
    peft_model: Any, directory: str | Path, *, adapter_name: str = "default", overwrite: bool = False
) -> Path:
    """Save a LoRA adapter with one rank for all layers and the scale 1, equal to the original up to rounding.

    Every `A` and `B` is padded with zeros to the largest rank, B is multiplied by its scale alpha / r (rsLoRA: alpha /
    sqrt(r)), and the config says `lora_alpha` = r, no patterns and `init_lora_weights=True`. Layers without the adapter
    stay without it. DoRA keeps its magnitudes, which stay correct because the scaled B A is the same. All layer types
    are exported, `nn.MultiheadAttention` with both of its projections.

    Args:
        peft_model: the model that carries the adapter; it is not changed.
        directory: the folder to write.
        adapter_name: the adapter to export.
        overwrite: replace a folder that exists.

    Returns:
        The folder; `PeftModel.from_pretrained` reads it.

    Raises:
        EvaError: no LoRA adapter of that name, a form of layer or LoRA variant that evatune does not know, an
            initialization that changed the base weights, or a folder that exists or cannot be written.

    Cost: O(layers * largest rank * (in_features + out_features)) numbers on disk.
    """
    model, config, layers = find_adapter(peft_model, adapter_name)
    check_layers(layers, adapter_name, config=config)
    if config.init_lora_weights not in _BASE_UNTOUCHED:
        raise EvaError(
            f"adapter {adapter_name!r} was initialized by {config.init_lora_weights!r}, which changed the base "
            "weights: on the original base model it means something else; convert it first "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    rank = max(layer.r[adapter_name] for layer in layers.values())
    with replace_folder(directory, holds="adapter_config.json", overwrite=overwrite) as folder:
        # PEFT knows what else belongs to an adapter (modules_to_save, embeddings): it saves first.
        with quiet_peft(), without_card(model):
            embeddings = saved_embeddings(model)
            model.save_pretrained(str(folder), selected_adapters=[adapter_name], save_embedding_layers=embeddings)
        saved = folder if adapter_name == "default" else folder / adapter_name
        tensors = load_file(saved / SAFETENSORS_WEIGHTS_NAME)
        for prefix, pair, scale in _pairs(model, layers, adapter_name):
            down, up = (f"{prefix}.{key}" for key in pair.saved_as)
            tensors[down], tensors[up] = pair.padded(tensors[down], tensors[up], rank=rank, scale=scale)
            if (bias := f"{prefix}.lora_B.bias") in tensors:
                tensors[bias] = tensors[bias] * scale
        portable = LoraConfig.from_pretrained(str(saved))
        if saved != folder:
            shutil.rmtree(saved)
        portable.r = portable.lora_alpha = rank
        portable.use_rslora = False
        portable.rank_pattern, portable.alpha_pattern = {}, {}
        portable.init_lora_weights, portable.eva_config = True, None
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        portable.save_pretrained(str(folder))
    return Path(directory).expanduser().absolute()


def _pairs(
    model: PeftModel, layers: Mapping[str, LoraLayer], adapter_name: str
) -> Iterator[tuple[str, Factors, float]]:
    """Yield every pair of factors, with the prefix of its names in a saved adapter, and its scale."""
    paths = {id(module): path for path, module in model.get_base_model().named_modules()}
    for layer in layers.values():
        for part, pair in zip(layers_of(layer), factors_of(layer, adapter_name), strict=True):
            path = paths[id(part)].replace("._orig_mod", "")
            yield f"base_model.model.{path}", pair, part.scaling[adapter_name]
