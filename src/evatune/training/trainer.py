"""Transformers' `Trainer` for a task: scores, a schedule without a rate of zero, errors for non-finite numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evatune.errors import EvaError
from evatune.settings import TrainSettings
from evatune.tasks.scores import Scores
from evatune.training.arguments import warmup_steps
from evatune.training.schedule import scheduler


class TaskTrainer(Trainer):
    """A `Trainer` that scores held-out data by the task, and ends or skips a step whose numbers are not finite.

    Args:
        settings: the recipe's section `train`.
        score: returns the scores of the model as it is; None where nothing is held out.
        counts_tokens: whether the model's loss is over the tokens of a whole step, see `evatune.tasks.task.Needs`.
        make_optimizer: returns the optimizer, or None for the Trainer's own; it is called when training begins.
        options: arguments of `Trainer`.
    """

    def __init__(
        self,
        *,
        settings: TrainSettings,
        score: Callable[[], Scores] | None,
        make_optimizer: Callable[[], torch.optim.Optimizer | None],
        counts_tokens: bool,
        **options: Any,
    ) -> None:
        self.settings, self.score, self.make_optimizer = settings, score, make_optimizer
        self._losses: list[Tensor] = []  # of this step
        super().__init__(**options)
        if not counts_tokens:  # transformers trusts all models whose `forward` takes any keyword
            self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer."""
        if self.optimizer is None:
            self.optimizer = self.make_optimizer()
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule of the learning rate; the first step's rate is above zero."""
        if self.lr_scheduler is None:
            chosen = optimizer or self.optimizer
            assert chosen is not None
            self.lr_scheduler = scheduler(
                chosen,
                n_steps=num_training_steps,
                n_warmup=warmup_steps(self.settings, n_steps=num_training_steps),
                schedule=self.settings.schedule,
                end=self.settings.final_learning_rate / self.settings.learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log the scores; after the last step `finetune` takes them anyway."""
        if self.score is None or self.state.global_step >= self.state.max_steps:
            return {}
        numbers = {f"eval_{name}": value for name, value in self.score().numbers().items()}
        self.log(numbers)
        return numbers

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log numbers; those that are not finite, of steps that were skipped, are left out."""
        super().log({name: value for name, value in logs.items() if math.isfinite(value)}, *args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Compute loss and gradients of a batch.

        Raises:
            EvaError: the loss of a batch of this step is not finite, and such steps are not to be skipped. Losses are
                read with the last batch of a step: for every number that the host reads, it waits for the device.
        """
        loss = super().training_step(model, *args, **kwargs)
        if not self.settings.allow_nonfinite:
            self._losses.append(loss)
            if self.accelerator.sync_gradients:
                losses, self._losses = torch.stack(self._losses).tolist(), []
                if wrong := [value for value in losses if not math.isfinite(value)]:
                    raise EvaError(_not_finite("loss", wrong[0], step=self.state.global_step + 1))
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, unless all steps are done: transformers would take one more from such a checkpoint."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)


class RateCallback(TrainerCallback):
    """Give the first step after a checkpoint its rate: the checkpoint may be of a run of another length."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute the rate of this step anew."""
        if state.global_step:
            schedule = kwargs["lr_scheduler"]
            schedule = getattr(schedule, "scheduler", schedule)  # accelerate's wrapper steps only after a gradient
            schedule.last_epoch -= 1
            schedule.step()


class FiniteGradientCallback(TrainerCallback):
    """End the run, or skip the step, if the gradient is not finite, before the weights change.

    Args:
        skip: go on without the step.
    """

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the norm of all gradients.

        Raises:
            EvaError: it is not finite, and such steps are not to be skipped.
        """
        norm = self.norm(kwargs["model"], kwargs["optimizer"])
        if math.isfinite(norm):
            return
        if not self.skip:
            raise EvaError(_not_finite("gradient's norm", norm, step=state.global_step + 1))
        self.drop(kwargs["model"], kwargs["optimizer"])

    def norm(self, model: nn.Module, optimizer: Any) -> float:
        """Return the norm of all gradients."""
        return float(nn.utils.clip_grad_norm_(model.parameters(), math.inf))  # clips nothing

    def drop(self, model: nn.Module, optimizer: Any) -> None:
        """Take the gradients away: an optimizer leaves weights without gradient alone."""
        model.zero_grad(set_to_none=True)


def _not_finite(what: str, value: float, *, step: int) -> str:
    return (
        f"the {what} of step {step} is {value:g}, so the run ends before that step changes the weights; take a smaller "
        "learning rate or precision fp32, or skip such steps (--allow-nonfinite)."
    )
