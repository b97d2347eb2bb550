"""The size of an adapter, against its plan and against what there is in the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import evatune
from evatune.adapters import initialized_plan
from evatune.adapters.counting import count_adapter


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.conv = nn.Embedding(40, 8), nn.Conv1d(8, 16, 3, padding=1)
        self.attn, self.fc = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 16)

    def forward(self, input_ids):
        x = self.conv(self.tokens(input_ids).transpose(1, 2)).transpose(1, 2)
        return x + self.fc(x + self.attn(x, x, x, need_weights=False)[0])


def mixture():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


@pytest.mark.parametrize("train_a", [True, False])
@pytest.mark.parametrize(
    ("build", "targets"),
    [(Encoder, ["tokens", "conv", "attn", "fc"]), (Encoder, "all-linear"), (mixture, "all-linear")],
    ids=["every layer type", "attention", "experts"],
)
def test_what_is_counted_is_what_is_planned_and_what_is_there(build, targets, train_a):
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 40, (4, 24), generator=generator)} for _ in range(3)]
    model = evatune.prepare(
        build(), method="eva", rank=3, batches=batches, target_modules=targets, train_a=train_a, progress=False
    )
    plan, size = initialized_plan(model), count_adapter(model, initialized_plan(model))
    assert size["components"] == plan.total
    assert (size["targets"], size["without_adapter"]) == (len(plan.ranks), list(plan.ranks.values()).count(0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert size["trainable"] == plan.n_parameters == sum(parameter.numel() for parameter in trained)


@pytest.mark.parametrize(("method", "components"), [("lora", 3 * 14), ("adalora", 7 * 14), ("vera", 0), ("full", 0)])
def test_other_methods(llama, method, components):
    size = count_adapter(evatune.prepare(llama(), method=method, rank=3, total_steps=10))
    assert (size["targets"], size["components"]) == (0 if method == "full" else 14, components)
