"""AdaLoRA in transformers' `Trainer`: cuts after every step, also after resuming from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evatune.adapters.adalora import allocator_state, kept_directions, restore_allocator, set_kept_directions
from evatune.errors import EvaError
from evatune.files import check_tensors, seal_tensors, write_bytes

FILE_NAME = "adalora.safetensors"


class AdaLoraCallback(TrainerCallback):
    """Let AdaLoRA weigh its directions and cut the least important ones after every optimizer step.

    A resumed training ends with exactly the weights of an uninterrupted one. For that, checkpoints contain all
    directions (one that is cut now may come back later) and their scores (`adalora.safetensors`). The adapter that is
    saved after training contains only the directions that the last cut kept.

    Args:
        resume_from: the checkpoint that training is resumed from; by default the one of its step in the output folder.

    Example:
        >>> Trainer(model=model, args=args, train_dataset=data, callbacks=[AdaLoraCallback()])  # doctest: +SKIP
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = resume_from
        self._kept: dict[str, list[bool]] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the scores of the checkpoint, if there is one.

        Raises:
            EvaError: the checkpoint has none.
        """
        self._kept = None
        if state.global_step:
            folder = Path(self.resume_from or _checkpoint(args, state))
            if not (folder / FILE_NAME).is_file():
                raise EvaError(
                    f"{folder} holds no {FILE_NAME}, without which AdaLoRA cannot go on as planned; "
                    "resume from another checkpoint or start again."
                )
            check_tensors(folder / FILE_NAME)
            self._kept = restore_allocator(kwargs["model"], load_file(folder / FILE_NAME))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the ranks, while the gradients are still there."""
        model = kwargs["model"]
        set_kept_directions(model, self._kept)
        model.base_model.update_and_allocate(state.global_step)
        self._kept = kept_directions(model)
        set_kept_directions(model, None)  # else PEFT saves, and loads, a checkpoint without the others

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the scores into the checkpoint."""
        if state.is_world_process_zero:
            scores = allocator_state(kwargs["model"], self._kept)
            seal_tensors(write_bytes(_checkpoint(args, state) / FILE_NAME, save(scores)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let PEFT save what the last cut kept."""
        set_kept_directions(kwargs["model"], self._kept)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
