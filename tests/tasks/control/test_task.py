"""The task of control, from a recipe to scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.on_device import TRAINED_BY_TRAINER
from transformers import AutoModel

from evatune.activations import measure
from evatune.errors import EvaError
from evatune.recipe import Recipe
from evatune.tasks import open_task
from evatune.tasks.control.environments import make_environment
from evatune.tasks.control.model import DecisionTransformer
from evatune.tasks.control.settings import ControlData
from evatune.tasks.control.task import Control
from evatune.tasks.settings import ModelSettings
from evatune.training import finetune


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, new_model: Callable[..., DecisionTransformer]) -> Path:
    """A folder with a tiny Decision Transformer."""
    folder = tmp_path_factory.mktemp("decision-transformer")
    new_model().save_pretrained(folder)
    return folder


def control(model: str | Path, **data: Any) -> Control:
    """Open the task."""
    settings = ControlData(**{"eval_episodes": 1, **data})
    task = open_task("control", settings, model=ModelSettings(name=str(model)), seed=0)
    assert isinstance(task, Control)
    return task


def recipe(model: str | Path, data: dict[str, Any], output: Path, **adapter: Any) -> Recipe:
    """A run of three steps."""
    return Recipe.from_dict(
        {
            "task": "control",
            "model": str(model),
            "data": {"eval_episodes": 1, **data},
            "adapter": {"rank": 4, **adapter},
            "measure": {"max_batches": 4, "batch_size": 16},
            "train": {"steps": 3, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32"},
            "output": str(output),
        }
    )


def test_goals_of_the_evaluation_are_in_no_training_episode(reach_episodes: Path, model_folder: Path) -> None:
    task = control(model_folder, train=[str(reach_episodes)], eval_episodes=5)
    assert [name for name, _ in task.held_out] == ["reach-v3"] * 5
    environment = make_environment("reach")
    goals = {environment.reset(seed=seed)[0][36:].tobytes() for _, seed in task.held_out}
    trained = {one.states[0][36:].tobytes() for one in task.episodes}
    assert len(goals) == 5
    assert not goals & trained


def test_the_best_return_is_asked_for(reach_episodes: Path, model_folder: Path) -> None:
    task = control(model_folder, train=[str(reach_episodes)])
    assert task.targets == {"reach-v3": max(one.total_return for one in task.episodes)}
    assert control(model_folder, train=[str(reach_episodes)], target_return=7).targets == {"reach-v3": 7.0}
    with pytest.raises(EvaError, match=r"no training episodes of push-v3 .* set data.target_return"):
        _ = control(model_folder, train=[str(reach_episodes)], eval=["push"]).held_out


def test_episodes_of_scripted_policies_are_collected_once(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path))
    first = control(model_folder, train=["reach"], episodes=1)
    assert len(first.train) == 200
    assert (tmp_path / "episodes" / "noise-0.1-seed-0" / "reach-v3" / "data").is_dir()
    monkeypatch.setattr("evatune.tasks.control.collecting._play", lambda *a, **o: pytest.fail("already collected"))
    again = control(model_folder, train=["reach"], episodes=1)
    np.testing.assert_array_equal(first.episodes[0].states, again.episodes[0].states)


def test_a_new_model_standardizes_states_as_its_data_need_it(reach_episodes: Path) -> None:
    task = control("new:1x2x16", train=[str(reach_episodes)], context=5, dropout=0.0, reward_tokens=False)
    model = task.load_model()
    assert (model.config.n_layer, model.config.n_head, model.config.n_embd, model.config.context) == (1, 2, 16, 5)
    states = np.concatenate([one.states for one in task.episodes])
    np.testing.assert_allclose(model.state_mean, states.mean(0), atol=1e-5)


@pytest.mark.parametrize("name", ["new:3x128", "new:3x5x128", "new:0x1x8"])
def test_sizes_that_make_no_model_are_refused(name: str, reach_episodes: Path) -> None:
    with pytest.raises(EvaError, match=f"model '{name}' is not new:LAYERSxHEADSxWIDTH"):
        control(name, train=[str(reach_episodes)]).load_model()


def test_another_model_or_context_is_refused(tiny_model: Path, model_folder: Path, reach_episodes: Path) -> None:
    with pytest.raises(EvaError, match="is a model of type 'llama', but task 'control' needs a Decision Transformer"):
        control(tiny_model, train=[str(reach_episodes)]).load_model()
    with pytest.raises(EvaError, match=r"data.context is 9, but .* was made for 6 steps"):
        _ = control(model_folder, train=[str(reach_episodes)], context=9).train


def test_a_model_that_was_not_pretrained_yet_is_told_how(
    tmp_path: Path, reach_episodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path))
    with pytest.raises(
        EvaError, match=r"holds no model .*small/model yet; make it with evatune finetune recipes/small"
    ):
        _ = control(tmp_path / "small" / "model", train=[str(reach_episodes)]).train


def test_scores_are_of_episodes(reach_episodes: Path, model_folder: Path) -> None:
    task = control(model_folder, train=[str(reach_episodes)], eval_episodes=3)
    model = task.load_model().train()
    scores = task.evaluate(model, limit=2, progress=False)
    assert model.training
    assert scores.headline == "success"
    assert len(scores.outcomes["success"]) == len(scores.outcomes["return"]) == scores.counts["episodes"] == 2
    assert scores["success"] == scores.counts["succeeded in reach-v3"] / 2


def test_a_video_is_written(
    reach_episodes: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_pictures: None
) -> None:
    from PIL import Image

    monkeypatch.setattr("evatune.tasks.control.rollout.EPISODE_STEPS", 12)

    task = control(model_folder, train=[str(reach_episodes)], video=str(tmp_path / "videos"))
    task.evaluate(task.load_model(), progress=False)
    with Image.open(tmp_path / "videos" / "reach-v3.gif") as video:
        assert (video.n_frames, video.size) == (3, (200, 160))


def test_a_place_that_takes_no_video_is_told_before_the_model_acts(
    reach_episodes: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evatune.tasks.control.task.roll_out", lambda *a, **o: pytest.fail("the model acted"))
    (tmp_path / "file").write_text("")
    task = control(model_folder, train=[str(reach_episodes)], video=str(tmp_path / "file"))
    with pytest.raises(EvaError, match=r"cannot write .*file: .*file is not a writable folder; choose another output"):
        task.evaluate(task.load_model(), progress=False)


def test_the_preview_shows_windows_and_a_filmstrip(reach_episodes: Path, model_folder: Path) -> None:
    preview = control(model_folder, train=[str(reach_episodes)]).preview(2)
    assert preview.text.count("── example") == 2
    assert "reach-v3" in preview.text
    assert "⟦" in preview.text
    assert len(preview.content[0]["actions"]) == len(preview.content[0]["timesteps"]) <= 6
    if preview.picture is None:
        assert f"no pictures: {preview.without_picture}" in preview.text
    else:
        assert preview.picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("reward_tokens", [True, False])
def test_eva_measures_every_token_of_every_step_and_no_padding(
    reward_tokens: bool, reach_episodes: Path, new_model: Callable[..., DecisionTransformer], tmp_path: Path
) -> None:
    new_model(reward_tokens=reward_tokens).save_pretrained(tmp_path)
    task = control(tmp_path, train=[str(reach_episodes)])
    model, asked = task.load_model(), task.needs(task.load_model())
    # The windows that end within the first five steps of an episode are shorter than the context of six.
    windows = [task.train[index] for index in range(len(task.train))]
    short = [window for window in windows if len(window["rewards"]) < 6]
    batches = [task.collate(short[:5]), task.collate(short[5:11] + windows[:2])]
    n_steps = sum(len(window["rewards"]) for window in short[:11] + windows[:2])
    spectra = measure(
        model, batches, row_mask=asked.row_mask, exclude_modules=[*asked.without_adapter, *asked.heads], rank=4
    )
    assert len(spectra.inputs) == 8
    assert {one.n_rows for one in spectra.inputs.values()} == {n_steps * (4 if reward_tokens else 3)}


@pytest.mark.parametrize("method", ["eva", "lora", "eva+dora"])
@pytest.mark.on_hardware(TRAINED_BY_TRAINER)
def test_a_run_trains_an_adapter_that_plain_peft_loads(
    method: str, reach_episodes: Path, model_folder: Path, tmp_path: Path
) -> None:
    record = finetune(
        recipe(model_folder, {"train": [str(reach_episodes)]}, tmp_path / "run", method=method), progress=False
    )
    assert record.before is not None
    assert record.after is not None
    assert record.data["episodes"] == 3
    # Two layers of four targets each; neither embeddings nor the action head have an adapter.
    assert record.parameters["targets"] == 8
    adapter = tmp_path / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["action_head"]
    base = AutoModel.from_pretrained(model_folder).eval()
    before = base.action_head.weight.clone()
    loaded = PeftModel.from_pretrained(base, adapter)
    names = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert not [name for name in names if "embed" in name or "action_head" in name]
    trained = loaded.base_model.model.action_head.modules_to_save["default"].weight
    assert not torch.equal(trained, before)


def test_a_run_without_adapter_trains_a_new_model_whole(reach_episodes: Path, tmp_path: Path) -> None:
    data = {"train": [str(reach_episodes)], "context": 4, "dropout": 0.0}
    record = finetune(recipe("new:1x2x16", data, tmp_path / "run", method="full"), progress=False)
    assert record.parameters["trainable"] == record.parameters["base"]
    again = control(tmp_path / "run" / "model", train=[str(reach_episodes)])
    model = again.load_model()
    assert model.config.context == 4
    assert model.state_scale.min() >= np.float32(0.02)
    assert model.state_scale.max() < 1
