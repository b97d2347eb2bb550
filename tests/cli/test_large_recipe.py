"""The path of the largest recipe on a tiny model: 4 bits, an adapter in bfloat16, checkpointing, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
OFFLOAD = ["accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
OFFLOAD += ["--use_deepspeed", "--zero_stage", "2", "--offload_optimizer_device", "cpu"]
RECIPE = Path(__file__).parents[2] / "recipes" / "paper" / "llama3.1-70b-commonsense.yaml"


@pytest.mark.parametrize("launcher", [TORCHRUN, OFFLOAD])
def test_two_processes_run_the_recipe_of_a_model_in_4_bits(launcher, tiny_model, tiny_data, tmp_path):
    if launcher is OFFLOAD:
        pytest.importorskip("deepspeed")
    data = ["--data", tiny_data / "train.jsonl", "--eval", tiny_data / "test.jsonl", "--max-length", "128"]
    short = ["--steps", "2", "--max-batches", "3", "--rank", "4", "--max-eval-examples", "4", "--json"]
    words = ["finetune", RECIPE, "--model", tiny_model, *data, *short, "--output", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "evatune", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])  # the launcher prints a line of its own
    assert record["steps"] == 2 and record["recipe"]["adapter"]["method"] == "eva+qlora"
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all("lora_" in name for name in tensors)  # nothing of the model in 4 bits
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
