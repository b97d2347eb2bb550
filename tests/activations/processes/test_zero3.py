"""Measuring a model that DeepSpeed ZeRO-3 has spread over gloo processes; runs where deepspeed is installed."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import evatune

pytestmark = [pytest.mark.slow, pytest.mark.on_cpu("its processes compute on the CPU and send by gloo")]

N_BATCHES = 8
OPTIONS = {"n_components": 8, "backend": "exact", "tau": None, "min_gain": None, "progress": False}
UNEVEN = {2: [range(7), [7]], 4: [[0, 1, 2, 3], [4], [5, 6], [7]]}
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    # Every parameter is spread, however small.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
UNTOUCHED = "not measured"
SCENARIOS = ("engine", "module", "failure", "engine after the failure", "checked", "gpt2", "fused experts")
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make(scenario: str) -> nn.Module:
    torch.manual_seed(0)
    if scenario == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    elif scenario == "fused experts":
        model = MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2))
    else:
        model = LlamaForCausalLM(LlamaConfig(**TINY))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim == 2 else 1)
    return model


def options_of(scenario: str) -> dict:
    if scenario == "fused experts":
        return OPTIONS | {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    return OPTIONS | ({"tau": 1.0} if scenario == "checked" else {})


def all_batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    masks = [(torch.arange(16) < torch.randint(2, 17, (4, 1), generator=generator)) for _ in range(N_BATCHES)]
    return [
        {"input_ids": torch.randint(0, 64, (4, 16), generator=generator), "attention_mask": mask.long()}
        for mask in masks
    ]


def failing(batches):
    yield batches[0]
    raise RuntimeError("the disk is gone")


def usable(engine) -> dict[str, float]:
    """One step of training, and how much of the model is here after it."""
    ids = torch.arange(16).view(2, 8)
    engine.train()
    losses = []
    for _ in range(2):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return {"losses": losses, "gathered": sum(parameter.numel() for parameter in engine.module.parameters())}


def work(rank: int, size: int, folder: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    import deepspeed

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    for scenario in (UNTOUCHED, *SCENARIOS):
        model = make(scenario)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
        if scenario == UNTOUCHED:
            Path(f"{folder}/{scenario}-{rank}.json").write_text(json.dumps({"after": usable(engine)}))
            continue
        even = scenario in ("failure", "checked")
        indices = range(rank, N_BATCHES, size) if even else UNEVEN[size][rank]
        batches = [all_batches()[index] for index in indices]
        batches = failing(batches) if scenario == "failure" and rank == 1 else batches
        facts = {}
        try:
            spectra = evatune.measure(
                engine.module if scenario == "module" else engine, batches, **options_of(scenario)
            )
            spectra.save(f"{folder}/{scenario}/{rank}")
        except Exception as error:
            facts["error"] = f"{type(error).__name__}: {error}"
        facts["gathered"] = sum(parameter.numel() for parameter in engine.module.parameters())
        facts["after"] = usable(engine)
        Path(f"{folder}/{scenario}-{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    size, folder = request.param, tmp_path_factory.mktemp("processes")
    mp.spawn(work, args=(size, str(folder)), nprocs=size, join=True)

    def of(scenario: str):
        facts = [json.loads((folder / f"{scenario}-{rank}.json").read_text()) for rank in range(size)]
        unmeasured = scenario == UNTOUCHED or any("error" in fact for fact in facts)
        return facts, [] if unmeasured else [
            evatune.Spectra.load(folder / scenario / str(rank)) for rank in range(size)
        ]

    return of


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "failure"])
def test_zero3_gives_what_the_whole_model_gives(results, largest_angle, scenario):
    facts, spectra = results(scenario)
    assert spectra, facts
    whole = evatune.measure(make(scenario), all_batches(), **options_of(scenario))
    assert list(spectra[0]) == list(whole)
    for name, spectrum in spectra[0].items():
        assert all(torch.equal(other[name].components, spectrum.components) for other in spectra)
        assert all(torch.equal(other[name].singular_values, spectrum.singular_values) for other in spectra)
        assert spectrum.n_rows == whole[name].n_rows
        # Products of float32 rows may be rounded to bfloat16, batch by batch.
        torch.testing.assert_close(spectrum.singular_values, whole[name].singular_values, rtol=0.01, atol=0.01)
        assert largest_angle(spectrum.components[:3], whole[name].components[:3]) < 0.05


def test_zero3_failing_ends_all_with_an_error(results):
    facts, _ = results("failure")
    errors = {rank: fact["error"] for rank, fact in enumerate(facts)}
    assert errors.pop(1) == "RuntimeError: the disk is gone"
    assert all(text.startswith("EvaError: process 1 failed while measuring") for text in errors.values())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_zero3_is_spread_again_and_trains_as_before(results, scenario):
    (untouched, *_), _ = results(UNTOUCHED)
    facts, _ = results(scenario)
    for fact in facts:
        assert fact["gathered"] == fact["after"]["gathered"] == 0
        if scenario not in ("gpt2", "fused experts"):
            assert fact["after"]["losses"] == untouched["after"]["losses"]
