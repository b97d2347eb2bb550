"""`step_cost`: bytes of fake tensors against those of real ones, operations against the known number."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evatune.adapters import prepare
from evatune.adapters.prepare import adapter_shapes
from evatune.hardware import autocast
from evatune.methods import METHODS
from evatune.training.setup import checkpoint_gradients
from evatune.training.step_cost import AliveBytes, step_cost

CONFIG = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4)

pytestmark = pytest.mark.on_cpu("operations and bytes are counted on tensors without values")


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.ones(8, 32, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens}


def shapes(method: str, **options):
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    return adapter_shapes(model, method=method, **options)[0]


def real_peak(model, *, bf16: bool) -> int:
    model.train()
    inputs = batch()
    with (
        AliveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as alive,
        autocast(torch.device("cpu"), "bfloat16" if bf16 else None),
    ):
        model(**inputs).loss.backward()
    return alive.peak


@pytest.mark.parametrize(
    ("method", "checkpoint", "bf16"),
    [
        ("lora", None, False),
        ("lora", None, True),
        ("lora", checkpoint_gradients, True),
        ("dora", None, True),
        ("full", None, False),
        ("full", checkpoint_gradients, False),
    ],
)
def test_fake_tensors_take_as_much_as_real_ones(method, checkpoint, bf16):
    empty = shapes(method, rank=4)
    real = prepare(LlamaForCausalLM(CONFIG), method=method, rank=4)
    if checkpoint is not None:
        checkpoint(real)
    told = step_cost(empty, batch, bf16=bf16, checkpoint=checkpoint).peak_bytes
    assert told == pytest.approx(real_peak(real, bf16=bf16), rel=0.06)


def test_checkpointing_takes_less():
    def cost(checkpoint):
        return step_cost(shapes("lora", rank=4), batch, checkpoint=checkpoint)

    kept, twice = cost(None), cost(checkpoint_gradients)
    assert twice.peak_bytes < 0.6 * kept.peak_bytes
    assert 1.3 < twice.flops / kept.flops < 1.6  # forward, again, and back


def test_operations_of_full_training_are_six_a_weight_and_token():
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG).requires_grad_(True)
    n_weights = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.model.embed_tokens.weight.numel()
    assert step_cost(model, batch).flops == pytest.approx(6 * n_weights * 8 * 32, rel=0.03)


def test_the_bytes_of_what_is_let_go_are_taken_off():
    with AliveBytes([]) as alive:
        first = torch.zeros(1000)
        view = first[10:]
        del first
        assert alive.now == 4000  # the view holds it
        del view
        assert alive.now == 0
        torch.zeros(100)
    assert alive.peak == 4000


@pytest.mark.parametrize("name", ["full", "adalora", "pissa", "vera", "boft", "eva+dora", "eva-frozen"])
def test_shapes_have_as_many_trainable_parameters_as_the_method(name):
    options = {"rank": 4, "rho": 1.0, "total_steps": 100} | ({"train_a": False} if name == "eva-frozen" else {})
    method = "eva" if name == "eva-frozen" else name
    empty = shapes(method, **options)
    batches = [batch()] if METHODS.get(method.partition("+")[0], METHODS["lora"]).needs_batches else None
    torch.manual_seed(0)
    model = prepare(LlamaForCausalLM(CONFIG), method=method, batches=batches, progress=False, **options)

    def trainable(one):
        return sum(parameter.numel() for parameter in one.parameters() if parameter.requires_grad)

    assert trainable(empty) == trainable(model)


def test_an_adapter_in_bfloat16_is_half_as_large():
    def trained(dtype):
        return [p for p in shapes("eva+dora", rank=4, adapter_dtype=dtype).parameters() if p.requires_grad]

    half, whole = trained("bfloat16"), trained("float32")
    assert {parameter.dtype for parameter in half} == {torch.bfloat16}
    assert sum(p.nbytes for p in half) * 2 == sum(p.nbytes for p in whole)
    real = prepare(LlamaForCausalLM(CONFIG), method="eva", batches=[batch()], adapter_dtype="bfloat16", progress=False)
    assert {p.dtype for p in real.parameters() if p.requires_grad} == {torch.bfloat16}
    with autocast(torch.device("cpu"), "bfloat16"):
        real(**batch()).loss.backward()
