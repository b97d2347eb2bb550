"""The folder of a run: which checkpoint is the newest, and with what a run may go on."""

from __future__ import annotations

import dataclasses

import pytest

from evatune.errors import EvaError
from evatune.files import write_checksums, write_text
from evatune.recipe import Recipe, all_settings
from evatune.training.folder import CHECKPOINTS, check_output, check_same_recipe, last_checkpoint, start_folder


def write_checkpoint(folder, step):
    path = folder / CHECKPOINTS / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    write_checksums(path)
    return path


def test_an_output_folder_that_takes_no_files_is_told_though_it_is_empty_or_a_run(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    check_output(folder, overwrite=False)
    monkeypatch.setattr("os.access", lambda path, mode: path != folder)
    for overwrite in (False, True):
        with pytest.raises(EvaError, match=r"cannot write .*run: .*run is not a writable folder; choose another"):
            check_output(folder, overwrite=overwrite)
        write_text(folder / "recipe.yaml", "")


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    """By name, 90 comes behind 100."""
    for step in (90, 100, 20):
        write_checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path, say=pytest.fail).name == "checkpoint-100"
    assert last_checkpoint(tmp_path / "nothing", say=pytest.fail) is None


def test_checkpoints_that_are_not_complete_or_not_whole_are_passed_and_named(tmp_path):
    write_checkpoint(tmp_path, 3)
    (write_checkpoint(tmp_path, 6) / "trainer_state.json").write_text("{ }")
    (write_checkpoint(tmp_path, 9) / "checksums.json").unlink()
    said = []
    assert last_checkpoint(tmp_path, say=said.append).name == "checkpoint-3"
    assert said == [
        "passed    checkpoint-9, which was not written to its end",
        "passed    checkpoint-6, which is damaged (trainer_state.json)",
    ]


FREE = {"output", "measure.spectra", "train.threads", "train.logging_steps", "train.eval_steps", "train.save_steps"}
FREE |= {"train.keep_checkpoints", "train.steps", "train.epochs", "model.config", "data.train_size"}
NEEDED_WITH = {"data.samples": {"temperature": 1.0}}
"""What a setting cannot be changed without."""
VALUES = {"train.final_learning_rate": 1e-5, "adapter.method": "pissa", "data.columns": {"prompt": "question"}}


def other_value(setting):
    """Return a value of a setting that is not its default."""
    if setting.path in VALUES:
        return VALUES[setting.path]
    if "tuple" in str(setting.kind):
        return ("other",)
    choices = getattr(setting.kind, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return next(choice for choice in choices if choice != setting.default)
    if isinstance(setting.default, bool):
        return not setting.default
    if "float" in str(setting.kind):
        return (setting.default or 1.0) / 2
    return "other" if "str" in str(setting.kind) else (setting.default or 56) + 8


def is_of_default_task(setting):
    section, _, name = setting.path.rpartition(".")
    return setting.path != "task" and (section != "data" or hasattr(Recipe().data, name))


SETTINGS = [setting for setting in all_settings() if is_of_default_task(setting)]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.path)
def test_a_run_goes_on_with_the_settings_that_decide_its_weights_and_scores(tmp_path, setting):
    """The held-out data among them: else the scores before and after would be of different data."""
    old = Recipe(output=str(tmp_path))
    section, _, name = setting.path.rpartition(".")
    changes = {name: other_value(setting)} | NEEDED_WITH.get(setting.path, {})
    new = dataclasses.replace(
        old, **({section: dataclasses.replace(getattr(old, section), **changes)} if section else changes)
    )
    start_folder(tmp_path / "run", old)
    if setting.path in FREE:
        check_same_recipe(tmp_path / "run", new)
    else:
        with pytest.raises(EvaError, match=rf"another recipe: .*{setting.path}\b.* was .* and is "):
            check_same_recipe(tmp_path / "run", new)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(EvaError, match="holds no run to resume"):
        check_same_recipe(tmp_path, Recipe())
