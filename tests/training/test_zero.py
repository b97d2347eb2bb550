"""Training under DeepSpeed ZeRO, as accelerate launches it: what is refused; it trains what one process does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evatune.errors import EvaError
from evatune.recipe import Recipe
from evatune.settings import TrainSettings
from evatune.training import finetune
from evatune.training.zero import check_resumes, launched_zero

OFFLOAD = ("--zero_stage", "2", "--offload_optimizer_device", "cpu")

# What a process does: the command line, then it keeps its own copy of what was trained. Poison is for the second one.
WORKER = """
import math, os, sys
import torch
from evatune import launch
from evatune.cli.main import main
from evatune.tasks.generation.task import Generation
from evatune.training.run import _Run

evaluated, load = _Run._evaluated, Generation.load_model

def keeping(self, when, model):
    if when == "after":
        trained = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        torch.save(trained, f"{os.environ['KEPT']}/{when}-{launch.number()}.pt")
    return evaluated(self, when, model)

def poisoned(self):
    model, passes = load(self), []
    def poison(module, inputs, output):
        passes.extend([0] * module.training)
        if len(passes) == 3 and module.training and launch.number() == 1:
            output.loss.register_hook(lambda gradient: gradient * math.inf)
    model.register_forward_hook(poison)
    return model

_Run._evaluated = keeping
if "POISON" in os.environ:
    Generation.load_model = poisoned
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function that says what `accelerate launch` would, in one process."""

    def launch(*, stage: int = 2, offload: str = "none", config: dict | None = None) -> None:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", offload)
        if config is not None:
            path = tmp_path / "deepspeed.json"
            path.write_text(json.dumps(config))
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))

    monkeypatch.setitem(sys.modules, "deepspeed", sys)  # it need not be installed
    return launch


def test_without_the_launcher_there_is_no_zero():
    assert launched_zero(Recipe()) is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"stage": 3}, "ZeRO stage 3 with .* finetune does stages 1 and 2 .*--method eva.qlora"),
        ({"stage": 0}, "ZeRO stage 0 with .* finetune does stages 1 and 2"),
        ({"offload": "nvme"}, "offload 'nvme' of the optimizer"),
        ({"config": {"zero_optimization": {"stage": 2}, "optimizer": {}}}, "has 'optimizer', but finetune takes only"),
        ({"config": {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}}, "gradient_clipping 0.5, and by"),
        ({"config": {"zero_optimization": {"stage": 2}, "train_batch_size": 64}}, "train_batch_size 64, .* it is 4"),
        ({"config": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}}, "fp16 True, and by the recipe"),
        ({"config": {"train_batch_size": "auto"}}, "accelerate cannot read the configuration of DeepSpeed: .*ZeRO"),
    ],
)
def test_what_is_not_done_is_refused_before_weights_are_read(launched, recipe, asked, message):
    launched(**asked)
    with pytest.raises(EvaError, match=message):
        finetune(recipe())


def test_a_method_that_reads_gradients_is_refused(launched, recipe):
    launched()
    with pytest.raises(EvaError, match=r"'adalora' reads the gradients .* which ZeRO has divided; launch it with"):
        finetune(recipe(adapter={"method": "adalora"}))


def test_zero_without_deepspeed_names_the_package(launched, recipe, monkeypatch):
    launched()
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(EvaError, match=r"needs DeepSpeed .*; run: pip install deepspeed"):
        finetune(recipe())


def test_what_the_recipe_says_is_what_deepspeed_is_told(launched):
    launched(config={"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"})
    settings = TrainSettings(batch_size=6, gradient_accumulation=3, max_grad_norm=0.25, precision="bf16")
    zero = launched_zero(replace(Recipe(), train=settings))
    assert zero is not None
    arguments = zero.arguments(settings)
    told = arguments["deepspeed"]
    assert told["train_batch_size"] == 18 and told["train_micro_batch_size_per_gpu"] == 6
    assert told["gradient_accumulation_steps"] == 3 and told["gradient_clipping"] == 0.25
    assert told["zero_optimization"]["stage"] == 1
    assert told["torch_autocast"]["enabled"] and not told["bf16"]["enabled"] and arguments["bf16"] is False


def test_a_checkpoint_goes_on_as_it_was_written(launched, tmp_path):
    launched(stage=1)
    zero = launched_zero(Recipe())
    assert zero is not None
    with pytest.raises(EvaError, match=r"was written without ZeRO, .* go on from it under ZeRO 1 with offload 'none'"):
        check_resumes(tmp_path, zero)
    (tmp_path / "zero.json").write_text(json.dumps(zero.to_json()))
    check_resumes(tmp_path, zero)
    with pytest.raises(EvaError, match=r"under ZeRO 1 with offload 'none' and 1 processes, .* without ZeRO; launch"):
        check_resumes(tmp_path, None)
    with pytest.raises(EvaError, match="cannot go on from it under ZeRO 2"):
        check_resumes(tmp_path, replace(zero, stage=2))


def in_two(recipe: Recipe, folder: Path, *launch: str, more: tuple[str, ...] = (), **environment: str):
    """Train in two processes."""
    pytest.importorskip("deepspeed")
    (folder / "worker.py").write_text(WORKER)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    words = ["--num_processes", "2", "--main_process_port", "0", "--use_deepspeed", *launch]
    words += [str(folder / "worker.py"), "finetune", str(folder / "recipe.yaml"), *more]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1", "KEPT": str(folder)} | environment,
    )


def adapter_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(Path(recipe.output) / "adapter" / "adapter_model.safetensors")


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def log_of(recipe: Recipe) -> list[dict[str, float]]:
    return json.loads((Path(recipe.output) / "run.json").read_text())["log"]


@pytest.mark.slow
def test_offload_trains_what_one_process_does_and_goes_on_after_a_stop(recipe, tmp_path):
    train = {"save_steps": 3, "keep_checkpoints": 2, "logging_steps": 1}
    wanted, plain = recipe("zero", train=train), recipe("plain", train=train)
    done = in_two(wanted, tmp_path, *OFFLOAD)
    assert done.returncode == 0, done.stderr
    assert "zero      stage 2, offload 'cpu'" in done.stderr
    finetune(plain, progress=False)
    first, second = (torch.load(tmp_path / f"after-{number}.pt", weights_only=True) for number in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    trained = adapter_of(wanted)
    moved = furthest(trained, load_file(Path(wanted.output) / "initial_adapter" / "adapter_model.safetensors"))
    assert furthest(trained, adapter_of(plain)) < 0.01 * moved
    for found, expected in zip(log_of(wanted), log_of(plain), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    folder = Path(wanted.output)
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    with pytest.raises(EvaError, match=r"under ZeRO 2 with offload 'cpu' and 2 processes, .* without ZeRO; launch it"):
        finetune(wanted, resume=True, progress=False)
    done = in_two(wanted, tmp_path, *OFFLOAD, more=("--resume",))
    assert done.returncode == 0, done.stderr
    assert furthest(adapter_of(wanted), trained) == 0
    assert json.loads((folder / "run.json").read_text())["resumed_from"] == 3


@pytest.mark.slow
def test_other_optimizers_and_precisions_train_what_one_process_does(recipe, tmp_path):
    train = {"precision": "bf16", "gradient_accumulation": 2, "logging_steps": 1, "lora_plus_ratio": 4}
    sections = {"train": train, "adapter": {"method": "eva+lora+"}}
    wanted, plain = recipe("zero", **sections), recipe("plain", **sections)
    done = in_two(wanted, tmp_path, "--zero_stage", "1")
    assert done.returncode == 0, done.stderr
    finetune(plain, progress=False)
    for found, expected in zip(log_of(wanted), log_of(plain), strict=True):
        assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("skips", [False, True])
def test_a_gradient_that_is_not_finite_in_one_process(recipe, tmp_path, skips):
    wanted = recipe(train={"allow_nonfinite": skips, "logging_steps": 1}, adapter={"adapter_dtype": "bfloat16"})
    done = in_two(wanted, tmp_path, *OFFLOAD, POISON="1")
    if not skips:
        assert done.returncode == 1
        assert done.stderr.count("the gradient's norm of step 3 is inf, so the run ends before that step") == 1
        return
    assert done.returncode == 0, done.stderr
    assert all(tensor.isfinite().all() for tensor in adapter_of(wanted).values())
    norms = {entry["step"]: entry.get("grad_norm") for entry in log_of(wanted)}
    assert norms[3] is None and norms[4] is not None
    rates = [entry["learning_rate"] for entry in log_of(wanted)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)
