"""Ctrl-C and SIGTERM while a command measures: what was measured is kept, however often they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evatune import Spectra
from evatune.cli.main import main
from evatune.tasks.generation import encoding

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def arguments(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> list[str]:
    """A measurement of two batches, of which the second is interrupted."""
    options = ["--model", str(tiny_model), "--data", str(tiny_data / "train.jsonl"), "--rank", "4"]
    return ["measure", *options, "--output", str(tmp_path / "spectra")]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_one_while_saving_destroys_nothing(arguments, tmp_path, monkeypatch, capsys, number):
    collate, save, calls = encoding.Collator.__call__, Spectra.save, []

    def interrupted(self, rows):
        calls.append(rows)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return collate(self, rows)

    def interrupted_too(self, *args, **kwargs):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(encoding.Collator, "__call__", interrupted)
    monkeypatch.setattr(Spectra, "save", interrupted_too)
    assert main(arguments) == 130
    assert "evatune: interrupted" in capsys.readouterr().err
    spectra = Spectra.load(tmp_path / "spectra")
    assert {(spectrum.n_batches, spectrum.stopped) for spectrum in spectra.inputs.values()} == {(2, "interrupted")}


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_that_hears_it_keeps_what_it_has(arguments, tiny_data, tmp_path, number):
    """A real process, in the middle of a measurement that would take minutes."""
    lines = (tiny_data / "train.jsonl").read_text()
    (tmp_path / "long.jsonl").write_text(lines * 300)
    endless = ["--data", str(tmp_path / "long.jsonl"), "--tau", "none", "--min-gain", "none", "--max-batches", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "evatune", *arguments, *endless, "--measure.batch-size", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("data"):
            break
    with pytest.raises(subprocess.TimeoutExpired, match="timed out"):
        process.wait(5)
    for _ in range(2):
        process.send_signal(number)
    _, rest = process.communicate(timeout=100)
    assert process.returncode == 130 and "evatune: interrupted" in rest
    spectra = Spectra.load(tmp_path / "spectra")
    assert {spectrum.stopped for spectrum in spectra.inputs.values()} == {"interrupted"}
