"""On a real model and real text, EVA's first gradient exceeds LoRA's at equal scale (Section 3 of the paper)."""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch

import evatune
from evatune.models import load_model, load_tokenizer


@pytest.mark.on_hardware("models are not loaded to it")
@pytest.mark.slow
def test_first_gradient_of_eva_exceeds_that_of_lora_on_smollm2(smollm2):
    tokenizer = load_tokenizer(smollm2)
    topics = pydoc_data.topics.topics
    tokens = [token for name in sorted(topics) for token in tokenizer(topics[name])["input_ids"]]
    ids = torch.tensor(tokens[: 5 * 4 * 128]).view(5, 4, 128)
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]
    norms = {}
    for method in ("lora", "eva"):
        options = {"batches": batches[:4], "rho": 1.0, "progress": False} if method == "eva" else {}
        model = evatune.prepare(load_model(smollm2), method=method, rank=16, **options)
        model(**batches[4]).loss.backward()  # a batch that neither has seen
        squares = [float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None]
        norms[method] = sum(squares) ** 0.5
    assert norms["eva"] > 2 * norms["lora"]
