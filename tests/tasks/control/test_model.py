"""The Decision Transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from evatune.tasks.control.model import DecisionTransformer, DecisionTransformerConfig

Build = Callable[..., DecisionTransformer]


def batch(*, valid: tuple[int, ...] = (6, 3, 1), steps: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Windows of so many steps each, padded."""
    chance, n = torch.Generator().manual_seed(seed), len(valid)
    return {
        "states": torch.randn(n, steps, 39, generator=chance),
        "actions": torch.rand(n, steps, 4, generator=chance) * 2 - 1,
        "rewards": torch.rand(n, steps, generator=chance) * 10,
        "returns_to_go": torch.rand(n, steps, generator=chance) * 1000,
        "timesteps": torch.arange(steps).expand(n, steps),
        "attention_mask": (torch.arange(steps) < torch.tensor(valid)[:, None]).long(),
    }


def test_the_loss_is_that_of_the_steps_that_are_there(new_model: Build) -> None:
    content = batch()
    output = new_model()(**content)
    errors = (output.actions.double() - content["actions"].double()).square()
    kept = [errors[number, :n] for number, n in enumerate((6, 3, 1))]
    assert output.loss.item() == pytest.approx(torch.cat(kept).mean().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["states", "actions", "rewards", "returns_to_go"])
def test_padding_is_never_looked_at(new_model: Build, name: str) -> None:
    model, content = new_model(), batch()
    before = model(**content)
    padding = content["attention_mask"] == 0
    content[name] = content[name].clone()
    content[name][padding] += 5
    after = model(**content)
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(after.actions[~padding], before.actions[~padding])


@pytest.mark.parametrize(
    ("name", "first_changed"), [("states", 2), ("returns_to_go", 2), ("actions", 3), ("rewards", 3)]
)
def test_an_action_is_predicted_from_what_came_before_it(new_model: Build, name: str, first_changed: int) -> None:
    model, content = new_model(), batch(valid=(6,))
    before = model(**content).actions
    content[name] = content[name].clone()
    content[name][:, 2] += 3
    changed = (model(**content).actions != before).any(-1)[0]
    assert changed.tolist() == [step >= first_changed for step in range(6)]


@pytest.mark.parametrize(("reward_tokens", "n_tokens"), [(True, 4), (False, 3)])
def test_the_mask_of_a_step_is_that_of_its_tokens(reward_tokens: bool, n_tokens: int, new_model: Build) -> None:
    mask = new_model(reward_tokens=reward_tokens).token_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert mask.tolist() == [[1] * 2 * n_tokens + [0] * n_tokens, [1] * n_tokens + [0] * 2 * n_tokens]


def test_three_tokens_a_step_know_no_rewards(new_model: Build) -> None:
    model, content = new_model(reward_tokens=False), batch(valid=(6,))
    assert model.config.n_positions == 18
    before = model(**content).actions
    assert torch.equal(model(**content | {"rewards": content["rewards"] + 5}).actions, before)


def test_the_time_step_is_an_option(new_model: Build) -> None:
    plain, timed, content = new_model(), new_model(time_steps=20), batch(valid=(6,))
    later = content | {"timesteps": content["timesteps"] + 7}
    assert torch.equal(plain(**content).actions, plain(**later).actions)
    assert not torch.equal(timed(**content).actions, timed(**later).actions)


def test_states_are_standardized_inside(new_model: Build) -> None:
    model, content = new_model(), batch(valid=(6,))
    before = model(**content).actions
    model.state_mean.copy_(torch.linspace(-3, 3, 39))
    model.state_scale.copy_(torch.linspace(0.1, 5, 39))
    states = content["states"] * model.state_scale + model.state_mean
    torch.testing.assert_close(model(**content | {"states": states}).actions, before)


def test_the_paper_s_size_has_its_parameters() -> None:
    with torch.device("meta"):
        model = DecisionTransformer(DecisionTransformerConfig(n_layer=4, n_head=8, n_embd=512))
    assert model.config.context == 50
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(12e6, rel=0.1)


def test_it_is_saved_and_loaded_whole(new_model: Build, tmp_path: Path) -> None:
    model, content = new_model(), batch()
    model.state_mean.fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, DecisionTransformer)
    assert loaded.config.context == 6
    assert torch.equal(loaded(**content).actions, model(**content).actions)


def test_bfloat16_autocast_and_gradient_checkpointing(new_model: Build) -> None:
    model, content = new_model(), batch()
    exact = model(**content).loss
    model.train()
    model.gradient_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**content).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "wte" not in name)
