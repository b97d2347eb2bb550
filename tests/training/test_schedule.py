"""The learning rate of each step: it trains from the first step on, and otherwise is what transformers schedules."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from evatune.errors import EvaError
from evatune.recipe import TrainSettings
from evatune.training.schedule import rate_factor, scheduler

NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def rates(schedule: str, *, n_steps: int, n_warmup: int) -> list[float]:
    return [rate_factor(step, n_steps=n_steps, n_warmup=n_warmup, schedule=schedule) for step in range(1, n_steps + 1)]


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize(("n_steps", "n_warmup"), [(10, 0), (10, 1), (10, 4), (1, 0), (1, 1), (7, 7)])
def test_every_step_trains_and_the_highest_rate_is_reached_once_warm(schedule, n_steps, n_warmup):
    factors = rates(schedule, n_steps=n_steps, n_warmup=n_warmup)
    assert min(factors) > 0
    assert max(factors) == factors[max(n_warmup, 1) - 1] == 1.0
    assert factors[:n_warmup] == pytest.approx([(step + 1) / max(n_warmup, 1) for step in range(n_warmup)])
    falling = factors[max(n_warmup, 1) - 1 :]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("n_warmup", [0, 3])
def test_rates_are_those_of_transformers_from_the_step_after_its_idle_one(schedule, n_warmup):
    idle = 1 if n_warmup else 0  # transformers' warm-up begins with a step of rate zero
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(NAMES[schedule], optimizer, num_warmup_steps=n_warmup, num_training_steps=10 + idle)
    expected = []
    for _ in range(10 + idle):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(schedule, n_steps=10, n_warmup=n_warmup) == pytest.approx(expected[idle:])


def test_groups_of_parameters_keep_their_ratio():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 16.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    plan = scheduler(optimizer, n_steps=4, n_warmup=2, schedule="linear")
    seen = []
    for _ in range(4):
        seen.append(plan.get_last_lr())
        optimizer.step()
        plan.step()
    assert [first for first, _ in seen] == pytest.approx([0.5, 1.0, 2 / 3, 1 / 3])
    assert all(second == pytest.approx(16 * first) for first, second in seen)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_fall_ends_where_it_is_told(schedule):
    def factor(step: int) -> float:
        return rate_factor(step, n_steps=100, n_warmup=10, schedule=schedule, end=0.1)

    assert [factor(5), factor(10)] == pytest.approx([0.5, 1.0])
    assert factor(101) == pytest.approx(0.1)
    assert factor(10) + factor(101) == pytest.approx(
        factor(40) + factor(71)
    )  # falls as much before the middle as after


@pytest.mark.parametrize("other", [{"schedule": "constant"}, {"learning_rate": 1e-6}])
def test_an_end_that_makes_no_sense_is_refused(other):
    with pytest.raises(EvaError, match=r"train.final_learning_rate is 1e-05, but must be at most train.learning_rate"):
        TrainSettings(**{"final_learning_rate": 1e-5, **other})
