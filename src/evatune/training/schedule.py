"""The learning rate over the steps of a training."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR


def rate_factor(step: int, *, n_steps: int, n_warmup: int, schedule: str, end: float = 0.0) -> float:
    """Return the learning rate of a step divided by the highest one.

    It rises linearly over the warm-up. The first step's rate is above zero, since a rate of zero would waste a step and
    its data. Then it falls so that the step after the last one would have the rate `end`.

    Args:
        step: from 1 on.
        n_steps: steps of the training.
        n_warmup: steps in which the rate rises; the last of them has the highest rate.
        schedule: `linear`, `cosine` or `constant`.
        end: what a linear fall or a cosine ends at, over the highest rate.
    """
    if step <= n_warmup:
        return step / n_warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - n_warmup) / (n_steps + 1 - n_warmup)) if n_warmup else (step - 1) / n_steps
    left = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return end + (1.0 - end) * left


def scheduler(
    optimizer: torch.optim.Optimizer, *, n_steps: int, n_warmup: int, schedule: str, end: float = 0.0
) -> LambdaLR:
    """Return the scheduler that gives every step its rate; see `rate_factor`."""
    factor = partial(rate_factor, n_steps=n_steps, n_warmup=n_warmup, schedule=schedule, end=end)
    return LambdaLR(optimizer, lambda n_done: factor(n_done + 1))
