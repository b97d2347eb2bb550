"""The command line in several processes, started by torchrun: what one process does, once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evatune import Spectra
from evatune.cli.main import main

pytestmark = pytest.mark.slow


def start(*words: object, **options: object) -> subprocess.Popen[str]:
    """Start a command in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.Popen(
        [*command, "-m", "evatune", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,  # type: ignore[call-overload]
    )


def in_two(*words: object) -> tuple[str, str]:
    """Run a command in two processes to its end, and return what it printed."""
    process = start(*words)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def options(tiny_model: Path, tiny_data: Path) -> list[str]:
    """What measuring takes."""
    rules = ["--tau", "none", "--min-gain", "none", "--max-batches", "5", "--precision", "fp32"]
    return ["--model", str(tiny_model), "--data", str(tiny_data / "train.jsonl"), "--rank", "2", *rules]


@pytest.fixture(scope="module")
def training(options: list[str], tiny_data: Path) -> list[str]:
    """What training takes."""
    return [*options, "--eval", str(tiny_data / "test.jsonl"), "--train.batch-size", "4", "--steps", "6"]


def test_two_processes_measure_and_initialize_what_one_does(options, tmp_path):
    out, err = in_two("measure", *options, "--output", tmp_path / "two")
    assert main(["measure", *options, "--output", str(tmp_path / "one")]) == 0
    two, one = Spectra.load(tmp_path / "two"), Spectra.load(tmp_path / "one")
    assert (two.settings["processes"], two.settings["max_batches"]) == (2, 3)
    for key, spectrum in one.inputs.items():
        assert two.inputs[key].n_rows == spectrum.n_rows
        assert two.inputs[key].n_batches == spectrum.n_batches == 5
        difference = (two.inputs[key].singular_values / spectrum.singular_values - 1).abs().max()
        assert difference < 1e-5
    assert err.count("saved     ") == err.count("data      ") == 1
    assert out.count("14 targets with 8 different inputs") == 1
    out, err = in_two("init", *options, "--spectra", tmp_path / "two", "--output", tmp_path / "adapter", "--json")
    assert json.loads(out)["plan"]["ranks"] == one.plan(2, 2.0).ranks
    assert (tmp_path / "adapter" / "plan.json").is_file()


def test_two_processes_train_and_score_what_one_does(training, tmp_path):
    out, err = in_two("finetune", *training, "--output", tmp_path / "two")
    assert main(["finetune", *training, "--output", str(tmp_path / "one")]) == 0
    two, one = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("two", "one"))
    assert [entry["step"] for entry in two["log"]] == [entry["step"] for entry in one["log"]]
    for found, expected in zip(two["log"], one["log"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert two["after"]["metrics"] == pytest.approx(one["after"]["metrics"], rel=1e-4)
    assert len(list((tmp_path / "two" / "tensorboard").glob("*"))) <= 1
    assert err.count("after     ") == err.count("step 6/6") == out.count("training loss") == 1
    out, _ = in_two("evaluate", tmp_path / "two", "--json", "--save", tmp_path / "scores.json")
    assert json.loads(out)["metrics"] == pytest.approx(two["after"]["metrics"], rel=1e-6)
    assert json.loads((tmp_path / "scores.json").read_text())["outcomes"]


def test_two_processes_train_a_classifier_as_one_does(tiny_model, tmp_path):
    rows = [{"sentence": f"{word} {number}", "label": word} for number in range(16) for word in ("good", "bad")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--task", "understanding", "--model", str(tiny_model), "--data", str(tmp_path / "train.jsonl")]
    words += ["--method", "lora", "--precision", "fp32", "--train.batch-size", "4", "--steps", "4"]
    words += ["--max-grad-norm", "0", "--logging-steps", "1"]
    in_two("finetune", *words, "--output", tmp_path / "two")
    assert main(["finetune", *words, "--output", str(tmp_path / "one")]) == 0
    two, one = (json.loads((tmp_path / name / "run.json").read_text())["log"] for name in ("two", "one"))
    for found, expected in zip(two, one, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_mistake_is_told_once(training, tmp_path):
    process = start("finetune", *training, "--train.batch-size", 5, "--output", tmp_path / "run")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert (
        err.count("evatune: train.batch_size is 5, which 2 processes cannot share equally; give a multiple of 2") == 1
    )
    assert "evatune/" not in err.partition("torch.distributed.elastic")[0]  # no traceback of ours
    assert not (tmp_path / "run").exists()


def test_sigterm_saves_and_both_go_on(training, tmp_path):
    long = [*training, "--steps", "100000", "--output", str(tmp_path / "run")]
    process = start("finetune", *long)
    assert process.stderr is not None
    for line in process.stderr:
        if re.search(r"step +10/", line):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=200)[1]
    stopped = re.search(r"stopped   at step (\d+); go on with --resume", rest)
    assert stopped is not None, rest
    kept = tmp_path / "run" / "checkpoints" / f"checkpoint-{stopped[1]}"
    assert {"checksums.json", "rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in kept.iterdir()}
