"""LoRA+: a higher learning rate for B than for A (Hayou et al. 2024, arXiv:2402.12354)."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer

from evatune.errors import EvaError


def loraplus_optimizer(
    model: PeftModel, *, learning_rate: float, ratio: float = 16.0, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Return AdamW with a higher learning rate for B than for all other parameters.

    Args:
        model: a model with a LoRA adapter.
        learning_rate: learning rate of A.
        ratio: learning rate of B over that of A; the authors recommend 2 to 32 and take 16.
        weight_decay: weight decay of all matrices.

    Raises:
        EvaError: `ratio` is below 1.

    Example:
        >>> optimizer = loraplus_optimizer(model, learning_rate=2e-4)  # doctest: +SKIP
        >>> Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))  # doctest: +SKIP
    """
    if not ratio >= 1:
        raise EvaError(f"the ratio of LoRA+ must be at least 1, got {ratio!r}: B learns faster than A.")
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=learning_rate, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay
    )


def optimizer_as_set(model: PeftModel, train: Any) -> torch.optim.Optimizer:
    """Return the optimizer that a recipe's section `train` asks for."""
    return loraplus_optimizer(
        model,
        learning_rate=train.learning_rate,
        ratio=train.lora_plus_ratio,
        weight_decay=train.weight_decay,
    )
