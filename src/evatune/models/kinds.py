"""What a pretrained model can be fine-tuned for, from its configuration alone."""

from __future__ import annotations

from typing import Any


def fitting_heads(config: Any) -> list[str]:
    """Return the heads that a pretrained model may get, by their names in `evatune.models.load_model`.

    An encoder with a masked language model's head can be loaded as a causal language model, but each of its positions
    sees the next ones: it would learn to copy its labels. So `causal-lm` is not among its heads.

    Args:
        config: its configuration.

    Returns:
        Names of heads; none for a model that transformers has no such classes for.
    """
    from transformers.models.auto import modeling_auto as auto

    classes: dict[str, Any] = {
        "causal-lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq-lm": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "sequence-classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "image-classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    heads = [head for head, names in classes.items() if config.model_type in names]
    is_masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and "seq2seq-lm" not in heads
    if is_masked and "causal-lm" in heads and not getattr(config, "is_decoder", False):
        heads.remove("causal-lm")
    return heads
