"""The command line, from measuring to text, on a tiny model: in this process, and once as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from evatune.cli.main import COMMANDS, build_parser, main
from evatune.cli.options import given_options
from evatune.errors import EvaWarning
from evatune.spectra import Spectra


@pytest.fixture(scope="module")
def spectra(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of spectra, measured through the command line."""
    folder = tmp_path_factory.mktemp("measured") / "spectra"
    train = str(tiny_data / "train.jsonl")
    arguments = ["--model", str(tiny_model), "--data", train, "--rank", "4", "--max-batches", "3"]
    assert main(["measure", *arguments, "--precision", "fp32", "--output", str(folder)]) == 0
    return folder


def test_help_is_quick_and_needs_no_torch():
    code = "import sys, evatune.cli.main as m; m.build_parser().format_help(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "default:" in text or command == "methods"  # which has no options


def test_the_short_name_of_two_settings_means_the_one_of_training():
    parser = build_parser()
    for words, meant in (
        (["finetune", "--batch-size", "3"], "train.batch_size"),
        (["measure", "--batch-size", "3"], "measure.batch_size"),
        (["init", "--measure.batch-size", "3"], "measure.batch_size"),
    ):
        assert given_options(parser.parse_args(words)) == {meant: "3"}


@pytest.mark.parametrize("words", [["--learning_rate", "2e-3"], ["--learning_rate=2e-3"], ["--learning-rate", "2e-3"]])
def test_options_may_be_written_with_underscores(capsys, words):
    assert main(["finetune", *words, "--model", "a_b", "--json"]) == 1
    assert "no data was given" in capsys.readouterr().err


def test_no_command_and_help_show_the_help(capsys):
    assert main([]) == 2
    assert "COMMAND --help` explains a command" in capsys.readouterr().err
    for words, shown in ((["help"], "explains a command"), (["help", "plan"], "usage: evatune plan SPECTRA")):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0 and shown in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_our_warnings_are_lines_without_a_place_in_the_code(monkeypatch, capsys):
    def warn(args):
        warnings.warn("few rows", EvaWarning, stacklevel=1)
        warnings.warn("old call", FutureWarning, stacklevel=1)

    monkeypatch.setattr("evatune.cli.methods.run", warn)
    with pytest.warns(FutureWarning, match="old call"):  # those of others are shown as ever
        assert main(["methods"]) == 0
    assert capsys.readouterr().err == "warning   few rows\n"


def test_version_and_usage_errors(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("evatune ")
    for wrong in (["train"], ["plan"], ["plan", "x", "--rnak", "3"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "--rnak=3"])
    assert "unknown argument '--rnak=3' (did you mean '--rank'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train"], "'finetune'"),
        (["measur"], "'measure'"),
        (["finetune", "--lr", "1"], "'--learning-rate'"),
        (["plan", "x", "--r=3"], "'--rank'"),
        (["finetune", "--max_steps", "3"], "'--steps'"),
        (["finetune", "--model-name-or-path=x"], "'--model'"),
    ],
)
def test_what_was_meant_is_named(capsys, words, meant):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert f"(did you mean {meant}" in capsys.readouterr().err


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])  # the latter in the background
def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path, monkeypatch, capsys, ctrl_c):
    from evatune.cli import plan

    present = signal.signal(signal.SIGINT, ctrl_c)
    monkeypatch.setattr(plan, "run", lambda args: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["plan", str(tmp_path), "--json"]) == 130
    finally:
        signal.signal(signal.SIGINT, present)
    assert json.loads(capsys.readouterr().out) == {"error": "interrupted"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_measure_saves_spectra(spectra):
    loaded = Spectra.load(spectra)
    assert len(loaded) == 14
    assert loaded.n_components == 8
    assert all(spectrum.n_batches == 3 for spectrum in loaded.inputs.values())


def test_plan_prints_draws_and_saves(spectra, tmp_path, capsys):
    files = ["--save", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "ranks.png")]
    assert main(["plan", str(spectra), "--rank", "4", "--rho", "1.5", *files]) == 0
    assert "trainable parameters" in capsys.readouterr().out
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert max(saved["ranks"].values()) <= 6

    assert main(["plan", str(spectra), "--rank", "4", "--rho", "1.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == saved
    assert main(["plan", str(spectra), "--rank", "4", *files]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["plan", str(spectra), "--rank", "4", *files, "--overwrite"]) == 0


def test_what_libraries_print_does_not_mix_with_the_object_for_programs(spectra, monkeypatch, capsys):
    load = Spectra.load

    def noisy(folder):
        print("a library was loaded")
        return load(folder)

    monkeypatch.setattr(Spectra, "load", noisy)
    assert main(["plan", str(spectra), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["ranks"] and "a library was loaded" in shown.err


def test_plan_takes_rank_and_rho_of_the_measurement(spectra, capsys):
    """They were measured with rank 4; rank 16 would need more components than they hold."""
    told = []
    for options in ([], ["--rank", "4", "--rho", "2"], ["--rank", "3"]):
        assert main(["plan", str(spectra), "--json", *options]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1]
    assert sum(told[2]["ranks"].values()) == 3 * 14


def test_plan_gives_away_parameters_instead_of_components(spectra, capsys):
    options = ["plan", str(spectra), "--rank", "4", "--json"]
    plans = []
    for budget in (["--budget", "components"], [], ["--budget", "parameters"]):
        assert main([*options, *budget]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1]
    assert (plans[1]["budget_in"], plans[2]["budget_in"]) == ("components", "parameters")
    assert plans[2]["ranks"] != plans[1]["ranks"]
    assert plans[2]["n_parameters"] <= plans[2]["uniform_parameters"]
    assert main([*options, "--budget", "parameters", "--no-train-a"]) == 0
    of_b = json.loads(capsys.readouterr().out)
    assert of_b["ranks"] != plans[2]["ranks"]
    assert of_b["uniform_parameters"] == 4 * sum(of_b["out_features"].values())
    assert main([*options, "--budget", "parameter"]) == 1
    assert "budget is 'parameter', but must be one of components, parameters" in capsys.readouterr().err


def test_init_writes_an_adapter_that_changes_nothing(spectra, tiny_model, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "adapter"
    arguments = ["--model", str(tiny_model), "--spectra", str(spectra), "--rank", "4", "--output", str(folder)]
    assert main(["init", *arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan == json.loads((folder / "plan.json").read_text())

    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    ids = torch.arange(3, 40)[None]
    expected = base(ids).logits
    adapted = PeftModel.from_pretrained(base, folder, is_trainable=True)
    assert torch.allclose(adapted(ids).logits, expected, atol=1e-6)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) > 0


def test_from_recipe_to_text(tiny_model, tiny_data, tmp_path, capsys):
    """Fine-tuned in a process of its own, as a user starts it; resumed (nothing is left to do) and used in this one."""
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\n"
        f"data:\n  train: {tiny_data / 'train.jsonl'}\n  eval: {tiny_data / 'test.jsonl'}\n"
        "adapter:\n  rank: 4\n"
        "measure:\n  max_batches: 2\n"
        "train:\n  steps: 4\n  batch_size: 4\n  learning_rate: 5e-3\n  threads: 1\n"
        "output: first\n"
    )
    command = [sys.executable, "-m", "evatune.cli.main", "finetune", str(tmp_path / "recipe.yaml"), "--steps", "3"]
    finished = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    record = json.loads(finished.stdout)
    assert record["steps"] == 3
    assert record["recipe"]["output"] == str(tmp_path / "first")
    assert "step 3/3" in finished.stderr
    assert "Warning" not in finished.stderr

    assert main(["finetune", "--resume", "--output", str(tmp_path / "first"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == record
    adapter = str(tmp_path / "first" / "adapter")
    assert main(["generate", "Is red true?", "--adapter", adapter, "--max-new-tokens", "4", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"prompt", "text", "tokens", "seconds"}


def test_generate_is_greedy_and_streams(tiny_model, capsys):
    arguments = ["generate", "Is red true?", "--model", str(tiny_model), "--max-new-tokens", "5"]
    assert main([*arguments, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == text.strip()
    assert main([*arguments, "--json", "--temperature", "2", "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] != text
    assert main([*arguments, "--json", "--raw"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] != text


def test_interrupted_measurement_is_saved(tiny_model, tiny_data, tmp_path, monkeypatch, capsys):
    from evatune.tasks.generation import encoding

    original, calls = encoding.Collator.__call__, []

    def collate(self, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, rows)

    monkeypatch.setattr(encoding.Collator, "__call__", collate)
    arguments = ["--model", str(tiny_model), "--data", str(tiny_data / "train.jsonl"), "--rank", "4"]
    assert main(["measure", *arguments, "--output", str(tmp_path / "spectra")]) == 130
    assert "interrupted" in capsys.readouterr().err
    spectra = Spectra.load(tmp_path / "spectra")
    assert {(spectrum.n_batches, spectrum.stopped) for spectrum in spectra.inputs.values()} == {(2, "interrupted")}


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_methods_fit_the_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["methods"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= min(columns, 110)


def test_methods_are_listed(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert "pissa" in text
    assert "eva+dora" in text
    assert main(["methods", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["methods"]["lora-ga"]["changes_base"] and content["methods"]["lora-ga"]["needs_gradients"]
    assert content["methods"]["pissa"]["refuses"] == ["qlora"]
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["eva"].split()[1:3] == ["yes", "A"] and lines["eva-grad"].split()[1:3] == ["labels", "EVA"]
    assert lines["pissa"].split()[1] == "yes" and lines["lora-ga"].split()[1:3] == ["labels", "yes"]
    assert "without options: full, adalora, vera, boft;" in text.replace("\n", " ")
    assert set(content["options"]) == {"rslora", "dora", "lora+", "qlora"}


def test_init_says_what_it_made_and_what_a_folder_cannot_say(tiny_model, tmp_path, capsys):
    def init(method, *options):
        folder = tmp_path / f"{method}-{len(options)}"
        code = main(
            ["init", "--model", str(tiny_model), "--rank", "2", "--output", str(folder), "--method", method, *options]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, out, err = init("dora")
    assert code == 0 and out.startswith("dora: rank 2 on 14 targets, 2,304 trainable parameters")
    assert "note" not in err
    code, out, err = init("rslora", "--no-train-a")
    assert "rslora: rank 2 on 14 targets, 896 trainable parameters" in out
    assert "note      to train B alone, call evatune.adapters.freeze_a(model) after loading" in err
    code, out, err = init("lora+", "--json")
    content = json.loads(out)
    assert content["trainable_parameters"] == 1856
    assert [note[:29] for note in content["notes"]] == ["lora+ is the optimizer's: giv"]
    assert "evatune.adapters.loraplus.loraplus_optimizer(model" in err


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("milora", "it changes the base weights"),
        ("full", "it trains the model itself and has no adapter"),
        ("vera", "its adapter is not LoRA"),
    ],
)
def test_init_refuses_what_is_no_adapter_to_start_from(tmp_path, capsys, method, reason):
    assert main(["init", "--model", "any", "--output", str(tmp_path / "adapter"), "--method", method]) == 1
    assert (
        f"method {method!r} for a trainer of your own, since {reason}; call evatune.prepare" in capsys.readouterr().err
    )


def test_init_refuses_starts_that_need_changed_base_weights(tiny_model, tiny_data, tmp_path, capsys):
    data = str(tiny_data / "train.jsonl")
    options = ["--model", str(tiny_model), "--data", data, "--output", str(tmp_path / "adapter"), "--rank", "4"]
    assert main(["init", *options, "--method", "pissa"]) == 1
    assert "since it changes the base weights; call evatune.prepare" in capsys.readouterr().err
    assert main(["init", *options, "--method", "eva-rot+rslora", "--max-batches", "2"]) == 0
    assert "trainable parameters" in capsys.readouterr().out
