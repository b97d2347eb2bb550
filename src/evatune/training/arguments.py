"""The one place where a recipe becomes transformers' `TrainingArguments`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from evatune import launch
from evatune.errors import EvaError
from evatune.hardware import best_device
from evatune.settings import TrainSettings
from evatune.training.schedule import rate_factor
from evatune.training.setup import uses_bf16


def check_shares(settings: TrainSettings, *, n_processes: int) -> None:
    """Check that so many processes can share a batch.

    Raises:
        EvaError: the batch cannot be divided equally.
    """
    if settings.batch_size % n_processes:
        raise EvaError(
            f"train.batch_size is {settings.batch_size}, which {n_processes} processes cannot share equally; give a "
            f"multiple of {n_processes}, as --train.batch-size {n_processes * -(-settings.batch_size // n_processes)}."
        )


def check_processes(settings: TrainSettings) -> None:
    """Check that the processes which were launched together can train.

    Raises:
        EvaError: they cannot share a batch equally, or the launcher asks for a sharded model.
    """
    check_shares(settings, n_processes=launch.n_processes())
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise EvaError(
            "finetune keeps the whole model in each process, and accelerate was configured for FSDP; launch it with "
            "torchrun, in 4 bits (--method eva+qlora) if the model needs it, or write the adapter with `evatune init` "
            "and train it with a script of your own."
        )


def total_steps(settings: TrainSettings, *, n_examples: int) -> int:
    """Return the number of optimizer steps."""
    if settings.steps is not None:
        return settings.steps
    batches_in_epoch = math.ceil(n_examples / settings.batch_size)
    return max(1, math.ceil(settings.epochs * math.ceil(batches_in_epoch / settings.gradient_accumulation)))


def warmup_steps(settings: TrainSettings, *, n_steps: int) -> int:
    """Return the number of steps in which the learning rate rises."""
    return math.ceil(settings.warmup_ratio * n_steps)


def learning_rate(settings: TrainSettings, *, step: int, n_steps: int) -> float:
    """Return the learning rate of a step, from 1 on."""
    factor = rate_factor(
        step,
        n_steps=n_steps,
        n_warmup=warmup_steps(settings, n_steps=n_steps),
        schedule=settings.schedule,
        end=settings.final_learning_rate / settings.learning_rate,
    )
    return settings.learning_rate * factor


def training_arguments(
    settings: TrainSettings,
    *,
    checkpoints: Path,
    n_examples: int,
    evaluates: bool = False,
    further: Mapping[str, Any] | None = None,
) -> TrainingArguments:
    """Return the Trainer's arguments.

    Args:
        settings: the recipe's training section.
        checkpoints: folder for checkpoints.
        n_examples: training examples.
        evaluates: there are held-out data, which are evaluated as often as the settings say.
        further: arguments that the task needs otherwise.
    """
    steps = total_steps(settings, n_examples=n_examples)
    arguments: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "max_steps": steps,
        "per_device_train_batch_size": settings.batch_size // launch.n_processes(),
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": "adamw_torch",
        "bf16": uses_bf16(settings),
        "use_cpu": best_device().type == "cpu",
        "logging_strategy": "steps",
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,  # the first gradient norm is part of the record
        "logging_nan_inf_filter": settings.allow_nonfinite,  # without those of skipped steps
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "save_total_limit": max(1, settings.keep_checkpoints),
        "eval_strategy": "steps" if settings.eval_steps and evaluates else "no",
        "eval_steps": settings.eval_steps,
        "report_to": "none",  # the callbacks are added one by one, see evatune.training.run
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": best_device().type == "cuda",
        "seed": settings.seed,
        "data_seed": settings.seed,
    }
    made = TrainingArguments(**arguments | dict(further or {}))
    made._n_gpu = min(1, made.n_gpu)  # with more, the Trainer would give each of them a batch of this size
    return made
