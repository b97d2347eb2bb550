"""The first blocks of a model, and a tiny run of the benchmark of processes in this process alone."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import evatune


@pytest.fixture
def processes(benchmark_script):
    return benchmark_script("processes")


def test_the_first_blocks_see_what_they_see_in_the_whole_model(processes):
    batches = [{"input_ids": torch.randint(0, 512, (2, 16))} for _ in range(2)]
    options = {"n_components": 4, "tau": None, "min_gain": None, "progress": False}
    first = r".*\.layers\.0\..*_proj"
    whole = evatune.measure(processes.tiny_model(), batches, target_modules=first, **options)
    model = processes.first_blocks(processes.tiny_model(), 1)
    cut = evatune.measure(model, batches, **options)
    assert list(cut.targets) == list(whole.targets) and len(cut.inputs) == 4
    for name, spectrum in whole.items():
        assert torch.equal(cut[name].components, spectrum.components)
    assert model.config.num_hidden_layers == 1
    with pytest.raises(ValueError, match=r"the model has 2 blocks, --layers 3 asks for more"):
        processes.first_blocks(processes.tiny_model(), 3)


@pytest.mark.on_cpu("it starts processes")
def test_a_tiny_run_of_processes(processes, monkeypatch, tmp_path, capsys):
    def run(size, parts, args):
        processes.work(0, 1, parts, str(tmp_path), args)
        spectra = evatune.Spectra.load(tmp_path / "0")
        (tmp_path / "0").rename(tmp_path / f"seen-{len(list(tmp_path.iterdir()))}")
        spectra.settings["bytes_sent"] = 1000 * (size - 1)  # nothing is really sent
        return [spectra] * size

    monkeypatch.setattr(processes, "run", run)
    monkeypatch.setattr(processes, "LENGTH", 16)
    files = {"--output": tmp_path / "results.json", "--picture": tmp_path / "picture.png"}
    options = [str(part) for pair in files.items() for part in pair]
    options += ["--tiny", "--batches", "2", "--held-out", "1", "--rank", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["processes.py", *options, "--processes", "1", "2", "--layers", "1"])
    processes.main()
    out, err = capsys.readouterr()
    assert "yes" in out
    steps = [line.split(" s  ")[1] for line in err.splitlines() if " s  " in line]
    ready = "model and batches are there, measuring"
    assert steps == [
        "1 of 2: 1 process with 2 batches each",
        ready,
        "2 of 2: 2 processes with 2 batches each",
        ready,
        "2 of 2: 1 process with these 4 batches",
        ready,
        "scoring on 1 held-out batches",
    ]
    results = json.loads(files["--output"].read_text())
    assert results["settings"]["layers"] == 1
    assert {facts["inputs"] for facts in results["processes"].values()} == {4}
    assert results["processes"]["2"]["bytes_sent_per_input"] == 250
    assert files["--picture"].read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(sys, "argv", ["processes.py", *options, "--processes", "1", "--quiet"])
    processes.main()  # one process alone has no bytes to draw
    assert capsys.readouterr().err == ""
    results = json.loads(files["--output"].read_text())
    assert results["settings"]["layers"] is None and results["processes"]["1"]["inputs"] == 8


def test_no_layers_at_all_are_refused(processes, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["processes.py", "--layers", "0"])
    with pytest.raises(SystemExit, match="2"):
        processes.main()
    assert "--layers must be at least 1, got 0" in capsys.readouterr().err
