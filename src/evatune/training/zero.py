"""DeepSpeed ZeRO in `finetune`, as `accelerate launch --use_deepspeed` asks for it: stages 1 and 2, with offload.

Each process holds the whole model. Gradients and the optimizer's state are divided among the processes, and may wait in
main memory. DeepSpeed takes the optimizer's step in the backward pass, so what looks at gradients looks afterwards.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from evatune import launch
from evatune.errors import EvaError
from evatune.files import write_json
from evatune.recipe import Recipe
from evatune.settings import TrainSettings
from evatune.training.setup import uses_bf16
from evatune.training.trainer import FiniteGradientCallback

FILE_NAME = "zero.json"
_HARMLESS = {"zero_optimization", "zero_allow_untested_optimizer", "steps_per_print", "wall_clock_breakdown"}


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What the launcher asked for."""

    stage: int
    """1 divides the optimizer's state among the processes, 2 the gradients too."""
    offload: str
    """Where the optimizer's state waits: `none` is on the accelerator, `cpu` in main memory."""
    section: Mapping[str, Any]
    """DeepSpeed's own settings of it, `zero_optimization`."""

    def arguments(self, settings: TrainSettings) -> dict[str, Any]:
        """Return arguments of the Trainer: DeepSpeed's configuration, in which what is not ZeRO follows the recipe."""
        config = _from_recipe(settings) | {"zero_optimization": dict(self.section), "steps_per_print": math.inf}
        # The weights keep their dtype, as without DeepSpeed; its own bf16 would round the adapter too.
        config["bf16"] = {"enabled": False}
        if uses_bf16(settings):
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # gradients are exchanged in the dtype of the adapter
            }
        return {"deepspeed": config, "bf16": False}

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint depends on."""
        return {"stage": self.stage, "offload": self.offload, "processes": launch.n_processes()}


def launched_zero(recipe: Recipe) -> Zero | None:
    """Return what `accelerate launch --use_deepspeed` asked for; None without it.

    Raises:
        EvaError: it is more than `finetune` can do, or says otherwise than the recipe.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("1", "true"):
        return None
    from accelerate.utils import DeepSpeedPlugin

    try:
        config: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
    except (ImportError, ValueError, OSError) as error:
        raise EvaError(f"accelerate cannot read the configuration of DeepSpeed: {error}") from error
    section = config["zero_optimization"]
    stage, offload, weights = section.get("stage"), _device(section, "optimizer"), _device(section, "param")
    if stage not in (1, 2) or offload not in ("none", "cpu") or weights != "none":
        raise EvaError(
            f"DeepSpeed is configured for ZeRO stage {stage} with offload {offload!r} of the optimizer and {weights!r} "
            "of the weights; finetune does stages 1 and 2 with 'none' or 'cpu' of the optimizer, and a model too large "
            "for that fits in 4 bits (--method eva+qlora)."
        )
    _check_same(config, _from_recipe(recipe.train))
    if recipe.adapter.choice.method.reads_gradients:
        raise EvaError(
            f"method {recipe.adapter.method!r} reads the gradients of the whole adapter, which ZeRO has divided; "
            "launch it with torchrun."
        )
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise EvaError(f"training under ZeRO needs DeepSpeed ({error}); run: pip install deepspeed.") from None
    if offload == "cpu":
        _build_optimizer()
    section = {key: value for key, value in section.items() if key != "offload_param" and "stage3" not in key}
    return Zero(stage=stage, offload=offload, section=section)


def check_resumes(checkpoint: Path, zero: Zero | None) -> None:
    """Check that a checkpoint was written as training goes on: the parts of ZeRO's optimizer fit only themselves.

    Raises:
        EvaError: it was not.
    """
    path = checkpoint / FILE_NAME
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    now = zero.to_json() if zero else None
    if before != now:
        raise EvaError(
            f"{checkpoint} was written {_told(before)}, and training cannot go on from it {_told(now)}; launch it as "
            "before, or start again."
        )


class ZeroCallback(FiniteGradientCallback):
    """What training under ZeRO has to do besides; its parts of the gradient are looked at by DeepSpeed.

    Args:
        zero: as launched.
        skip: go on after a step whose gradient is not finite.
    """

    def __init__(self, zero: Zero, *, skip: bool) -> None:
        super().__init__(skip=skip)
        self.zero = zero

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let DeepSpeed leave out a step whose gradient is not finite in any process: by itself it trusts bfloat16."""
        kwargs["optimizer"].optimizer.check_grad_overflow = True

    def norm(self, model: nn.Module, optimizer: Any) -> float:
        """Return infinity if DeepSpeed has just left out a step."""
        return math.inf if optimizer.step_was_skipped else 0.0

    def drop(self, model: nn.Module, optimizer: Any) -> None:
        """Take the divided gradients away, which DeepSpeed 0.19 would add to those of the next steps under offload.

        The learning rate goes on, as it does after a step that is skipped without ZeRO.
        """
        parts = optimizer.optimizer
        parts.averaged_gradients = dict.fromkeys(parts.averaged_gradients)
        parts.overflow = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note in the checkpoint how it was written."""
        if state.is_world_process_zero:
            write_json(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE_NAME, self.zero.to_json())


def _from_recipe(settings: TrainSettings) -> dict[str, Any]:
    """Return what DeepSpeed's configuration says of a recipe."""
    return {
        "train_batch_size": settings.batch_size * settings.gradient_accumulation,
        "train_micro_batch_size_per_gpu": settings.batch_size // launch.n_processes(),
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "gradient_clipping": settings.max_grad_norm,
        "fp16": {"enabled": False},
        "bf16": {"enabled": uses_bf16(settings)},
    }


def _check_same(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name in _HARMLESS:
            continue
        if name not in recipe:
            raise EvaError(
                f"the configuration of DeepSpeed has {name!r}, but finetune takes only 'zero_optimization' from it, "
                "and the rest from the recipe; remove it."
            )
        said, wanted = (part["enabled"] if isinstance(part, dict) else part for part in (value, recipe[name]))
        is_default = name == "gradient_accumulation_steps" and said == 1  # accelerate writes it where nothing was said
        if said not in ("auto", wanted) and not is_default:
            raise EvaError(
                f"the configuration of DeepSpeed has {name} {said!r}, and by the recipe it is {wanted!r}; write 'auto' "
                "there, or change the recipe."
            )


def _device(section: Mapping[str, Any], name: str) -> str:
    return str((section.get(f"offload_{name}") or {}).get("device") or "none")


def _build_optimizer() -> None:
    """Let DeepSpeed compile its optimizer for the processor now, where that fails, and not after measuring."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))])
    except Exception as error:  # whatever a compiler, a linker or a missing library raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EvaError(
            f"DeepSpeed cannot compile its optimizer for the processor ({reason}); it needs a C++ compiler and ninja, "
            "or launch without offload."
        ) from error


def _told(kept: Mapping[str, Any] | None) -> str:
    if kept is None:
        return "without ZeRO"
    return f"under ZeRO {kept['stage']} with offload {kept['offload']!r} and {kept['processes']} processes"
