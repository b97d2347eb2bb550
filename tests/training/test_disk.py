"""A disk that is full or gone in the middle of a run: one sentence, and nothing half-written is taken for whole."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
from transformers import TrainerCallback

from evatune import Spectra
from evatune.cli.main import main
from evatune.errors import EvaError
from evatune.training import finetune, rescue
from evatune.training import run as run_module
from evatune.training.trainer import TaskTrainer


class At(TrainerCallback):
    """Do something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture
def after_step(monkeypatch):
    """Return a function that makes the next runs do something after a step."""

    def plan(step, action):
        class Acting(TaskTrainer):
            def train(self, *args, **kwargs):
                self.add_callback(At(step, action))
                return super().train(*args, **kwargs)

        monkeypatch.setattr(run_module, "TaskTrainer", Acting)

    return plan


@pytest.fixture
def disk():
    """Return functions that fill the disk and make room again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Disk:
        def fill(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

        def make_room(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield Disk()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_goes_on_where_the_disk_was_full(recipe, after_step, disk, capsys):
    wanted = recipe(train={"steps": 6, "save_steps": 2})
    folder = Path(wanted.output)
    after_step(3, disk.fill)
    with pytest.raises(EvaError, match=rf"cannot write {folder}: .*; make room there, then go on with --resume"):
        finetune(wanted, progress=False)
    disk.make_room()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert not (folder / "adapter").exists()
    assert "Traceback" not in capsys.readouterr().err
    after_step(0, disk.fill)
    record = finetune(wanted, resume=True, progress=False)
    assert (record.resumed_from, record.steps) == (2, 6)


@pytest.mark.parametrize("step", [3, 6])
def test_a_folder_that_vanishes_is_not_made_anew(recipe, after_step, step):
    wanted = recipe(train={"steps": 6, "logging_steps": 100})
    folder = Path(wanted.output)
    after_step(step, lambda: shutil.rmtree(folder))
    with pytest.raises(EvaError, match=rf"{folder} was removed or moved while the run went on"):
        finetune(wanted, progress=False)
    assert not (folder / "run.json").exists()


@pytest.fixture
def measured(monkeypatch):
    """Make each command do something right after it has measured."""

    def plan(module, action):
        real = module.measure_recipe

        def measure_recipe(*args, **kwargs):
            spectra = real(*args, **kwargs)
            action()
            return spectra

        monkeypatch.setattr(module, "measure_recipe", measure_recipe)

    return plan


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(rescue.tempfile, "gettempdir", lambda: str(folder))
    return folder


def block(folder: Path) -> None:
    """Put a file where a folder should be."""
    folder.rmdir()
    folder.write_text("")


@pytest.mark.parametrize("command", ["measure", "finetune"])
def test_what_was_measured_is_kept_in_another_place(recipe, measured, elsewhere, tmp_path, capsys, command):
    place = tmp_path / "place"
    place.mkdir()
    from evatune.training import setup

    (tmp_path / "r.yaml").write_text(recipe().to_yaml())
    measured(setup if command == "measure" else run_module, lambda: block(place))
    assert main([command, str(tmp_path / "r.yaml"), "--output", str(place / "out")]) == 1
    (kept,) = elsewhere.glob("*/spectra")
    message = capsys.readouterr().err
    assert f"evatune: cannot write {place / 'out'}: " in message
    assert (
        f"What was measured is not lost, it is in {kept}: move it, or go on from there with --spectra {kept}."
        in message
    )
    assert len(Spectra.load(kept)) == 14
    assert not place.is_dir()


def test_where_no_place_is_left_the_first_error_stays(recipe, measured, elsewhere, tmp_path, disk, capsys, monkeypatch):
    from evatune.training import setup

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text(recipe().to_yaml())
    measured(setup, disk.fill)
    assert main(["measure", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "out")]) == 1
    disk.make_room()
    assert capsys.readouterr().err.count("evatune: cannot write") == 1
    assert not list(elsewhere.iterdir()) and not list(tmp_path.glob("evatune-*")) and not (tmp_path / "out").exists()
