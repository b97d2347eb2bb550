"""Models and data by their ids on a hub, which is one on this machine here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.models.fake_hub import FakeHub, fake_hub

from evatune.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tiny_model: Path, tiny_data: Path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_model, folder / "models" / "someone" / "tiny-llama")
    data = folder / "datasets" / "someone" / "questions"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        shutil.copy(tiny_data / f"{split}.jsonl", data)
    with fake_hub(folder) as running:
        yield running


@pytest.fixture
def on_hub(hub: FakeHub, tmp_path: Path):
    """Return a function that runs a command whose only hub is this one."""

    def run(*words: object, offline: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "evatune", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=tmp_path,
            env=os.environ
            | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": str(int(offline))}
            | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        )

    return run


SHORT = ["--rank", "2", "--max-batches", "3", "--tau", "none", "--min-gain", "none", "--precision", "fp32"]
IDS = ["--model", "someone/tiny-llama", "--data", "someone/questions", "--eval", "someone/questions"]


def test_ids_of_model_and_data_train_what_their_files_do(on_hub, hub, tiny_model, tiny_data, tmp_path):
    length = ["--steps", "2", "--train.batch-size", "4", "--max-eval-examples", "8"]
    done = on_hub("finetune", *IDS, *SHORT, *length, "--output", "hub")
    assert done.returncode == 0, done.stderr
    assert any("/someone/tiny-llama/resolve/" in path for path in hub.asked)
    files = ["--model", tiny_model, "--data", tiny_data / "train.jsonl", "--eval", tiny_data / "test.jsonl"]
    assert main(["finetune", *map(str, files), *SHORT, *length, "--output", str(tmp_path / "files")]) == 0
    ours, theirs = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("hub", "files"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    config = json.loads((tmp_path / "hub" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny-llama"
    asked = len(hub.asked)
    done = on_hub("measure", *IDS[:4], *SHORT, "--output", "spectra", offline=True)  # from the cache of the first run
    assert done.returncode == 0, done.stderr
    assert len(hub.asked) == asked
    assert (tmp_path / "spectra").is_dir()
    done = on_hub("evaluate", "hub", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "hub" / "run.json").read_text())
    assert json.loads(done.stdout)["metrics"] == pytest.approx(record["after"]["metrics"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model", "someone/tiny-lama", *IDS[2:4]],
            "someone/tiny-lama is not a local folder and is not a valid model",
        ),
        ([*IDS[:4], "--revision", "old"], "old is not a valid git identifier"),
        ([*IDS[:2], "--data", "someone/answers"], "there is no data file someone/answers, and it cannot be loaded"),
        ([*IDS[:4], "--train-split", "training"], "Should be one of ['train', 'test']"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(words, message, on_hub):
    done = on_hub("measure", *words, *SHORT, "--output", "spectra")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("evatune: ")]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in done.stderr
