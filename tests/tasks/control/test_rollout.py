"""Acting in environments."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from evatune.tasks.control import rollout
from evatune.tasks.control.environments import episode_seed, make_environment, quiet, scripted_policy
from evatune.tasks.control.model import DecisionTransformer
from evatune.tasks.control.rollout import roll_out


class Scripted(torch.nn.Module):
    """Acts as Meta-World's scripted policy for the last state, and remembers what it was given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.policy = scripted_policy(name)
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, **batch: Tensor) -> Any:
        self.seen.append({name: values.clone() for name, values in batch.items()})
        with quiet():
            last = [self.policy.get_action(state.double().numpy()) for state in batch["states"][:, -1]]
        actions = torch.zeros_like(batch["actions"])
        actions[:, -1] = torch.from_numpy(np.stack(last))
        return SimpleNamespace(actions=actions)


def test_a_perfect_model_succeeds_as_its_teacher_does() -> None:
    seeds = [episode_seed(0, index, stream="eval") for index in range(2)]
    outcomes = roll_out(Scripted("reach-v3"), {"reach-v3": seeds}, {"reach-v3": 1800.0}, context=5)
    assert [outcome.seed for outcome in outcomes] == seeds
    assert all(outcome.success for outcome in outcomes)
    environment, policy = make_environment("reach"), scripted_policy("reach-v3")
    observation, total = environment.reset(seed=seeds[1])[0], 0.0
    for step in range(200):
        with quiet():
            action = np.clip(policy.get_action(observation.astype(np.float64)), -1, 1)
        np.testing.assert_allclose(outcomes[1].actions[step], action, atol=1e-6)
        observation, reward, *_ = environment.step(action)
        total += reward
    assert outcomes[1].total_return == pytest.approx(total, rel=1e-3)


def test_the_model_sees_the_last_steps_and_what_is_left_of_the_return() -> None:
    model = Scripted("reach-v3")
    roll_out(model, {"reach-v3": [1]}, {"reach-v3": 1000.0}, context=5)
    assert [batch["states"].shape[1] for batch in model.seen] == [1, 2, 3, 4] + [5] * 196
    last = model.seen[-1]
    assert last["timesteps"].tolist() == [[195, 196, 197, 198, 199]]
    received = torch.cat([batch["rewards"][:, -2] for batch in model.seen[1:]])
    for step, batch in enumerate(model.seen):
        assert batch["returns_to_go"][0, -1].item() == pytest.approx(1000 - received[:step].sum().item(), abs=0.01)
    torch.testing.assert_close(last["returns_to_go"][0, :-1], model.seen[-2]["returns_to_go"][0, 1:])
    assert last["actions"][0, -1].eq(0).all()  # not chosen yet
    assert last["actions"][0, :-1].any(-1).all()


def test_episodes_side_by_side_go_as_each_alone(
    new_model: Callable[..., DecisionTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, targets = {"reach-v3": [1, 2, 3], "push-v3": [4]}, {"reach-v3": 1500.0, "push-v3": 1000.0}
    model, told = new_model(), []
    monkeypatch.setattr(rollout, "EPISODE_STEPS", 20)
    monkeypatch.setattr(rollout, "N_ENVIRONMENTS", 4)
    together = roll_out(model, seeds, targets, context=3, tell=told.append)
    alone = [
        roll_out(model, {name: [seed]}, targets, context=3)[0] for name, numbers in seeds.items() for seed in numbers
    ]
    assert [(one.environment, one.seed) for one in together] == [(one.environment, one.seed) for one in alone]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.total_return == pytest.approx(theirs.total_return, rel=1e-3)
    assert sum(told) == 4


def test_a_success_that_does_not_last_counts(
    new_model: Callable[..., DecisionTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fleeting(gymnasium.Env):
        """Reports success in its second step alone."""

        observation_space = gymnasium.spaces.Box(-1, 1, (39,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            self.steps = 0
            return np.zeros(39, np.float32), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            self.steps += 1
            return np.zeros(39, np.float32), 1.0, False, False, {"success": self.steps == 2}

    monkeypatch.setattr(rollout, "EPISODE_STEPS", 4)
    monkeypatch.setattr(rollout, "make_environment", lambda name: Fleeting())
    (outcome,) = roll_out(new_model(), {"reach-v3": [1]}, {"reach-v3": 10.0}, context=3)
    assert outcome.success
    assert outcome.total_return == 4.0
