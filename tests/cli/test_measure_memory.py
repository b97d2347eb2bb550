"""`evatune measure --dry-run` and `--from-disk` against the ordinary command."""

from __future__ import annotations

import json

import torch

from evatune.cli.main import main
from evatune.spectra import Spectra


def test_a_dry_run_needs_neither_weights_nor_data_nor_output(tiny_model, tmp_path, capsys):
    folder = tmp_path / "only-config"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    arguments = ["measure", "--model", str(folder), "--dry-run", "--rank", "4", "--max-length", "32"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj (+2)" in text and "waiting hidden states" in text
    assert main([*arguments, "--json", "--max-batches", "5", "--measure.batch-size", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["n_inputs"], told["max_batches"], told["kinds"][0]["n_rows"]) == (8, 5, 96)
    assert [path.name for path in tmp_path.iterdir()] == ["only-config"]
    assert main(["measure", "--dry-run"]) == 1
    assert "model" in capsys.readouterr().err


def test_from_disk_gives_the_spectra_of_the_ordinary_command(tiny_model, tiny_data, tmp_path, capsys):
    train = str(tiny_data / "train.jsonl")
    common = ["measure", "--model", str(tiny_model), "--data", train, "--rank", "4", "--max-batches", "3"]
    rules = ["--tau", "none", "--min-gain", "none", "--precision", "fp32"]
    assert main([*common, *rules, "--output", str(tmp_path / "whole")]) == 0
    assert main([*common, *rules, "--output", str(tmp_path / "blocks"), "--from-disk"]) == 0
    assert "14 targets with 8 different inputs" in capsys.readouterr().out
    whole, blocks = (Spectra.load(tmp_path / name) for name in ("whole", "blocks"))
    assert blocks.settings["from_disk"] is True and "from_disk" not in whole.settings
    assert list(whole.inputs) == list(blocks.inputs) and whole.targets == blocks.targets
    for key in whole.inputs:
        torch.testing.assert_close(blocks.inputs[key].components, whole.inputs[key].components, rtol=0, atol=0)
    assert main([*common, "--output", str(tmp_path / "blocks"), "--from-disk"]) == 1
    assert "exists" in capsys.readouterr().err
