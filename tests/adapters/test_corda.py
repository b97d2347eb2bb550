"""What CorDA looks at: examples without padding, on either side of a model, and vectors."""

from __future__ import annotations

import pytest
import torch
from tests import fake_device
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import evatune
from evatune.adapters.corda import examples
from evatune.errors import EvaError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0, pad_token_id=0)).eval()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=99, **SIZES)).eval()


def tokens(*shape, seed=0):
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(seed))


def factors(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


def covariance_start(rows, weight, rank=4):
    """CorDA in float64, from the rows of each call."""
    wide = [x.double() / x.double().max().abs() for x in rows]
    covariance = sum(x.T @ x for x in wide) / len(wide)
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
    left, values, right = torch.linalg.svd(weight.double() @ covariance, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(covariance)


def test_both_sides_of_an_encoder_decoder_are_looked_at_without_their_padding(outputs):
    ids, labels = tokens(3, 12), tokens(3, 7, seed=1)
    mask = torch.ones_like(ids)
    mask[1, 5:], labels[2, 4:] = 0, -100
    base = t5()
    wanted = ["decoder.block.1.layer.2.DenseReluDense.wi", "encoder.block.1.layer.0.SelfAttention.q"]
    rows = {name: [] for name in wanted}
    hooks = [
        base.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: rows[n].append(args[0][0].detach()))
        for name in wanted
    ]
    for i in range(3):
        short = labels[i : i + 1, : int((labels[i] != -100).sum())]
        base(input_ids=ids[i : i + 1, mask[i].bool()], labels=short)
    [hook.remove() for hook in hooks]
    weights = {name: base.get_submodule(name).weight.detach().clone() for name in wanted}
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    expected = outputs(base, batch)
    model = evatune.prepare(base, method="corda", rank=4, batches=[batch], task_type="SEQ_2_SEQ_LM").eval()
    torch.testing.assert_close(outputs(model, batch), expected, atol=1e-4, rtol=1e-4)
    for name in wanted:
        layer = model.get_base_model().get_submodule(name)
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(product.double(), covariance_start(rows[name], weights[name]), atol=1e-3, rtol=1e-3)


def test_pooled_vectors_are_rows_like_others(outputs):
    batch = {"input_ids": tokens(6, 12), "labels": torch.zeros(6, dtype=torch.long)}
    base, rows = bert(), []
    hook = base.bert.pooler.dense.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    for i in range(6):
        base(input_ids=batch["input_ids"][i : i + 1])
    hook.remove()
    assert rows[0].shape == (1, 32)
    weight, expected = base.bert.pooler.dense.weight.detach().clone(), outputs(base, batch)
    model = evatune.prepare(base, method="corda", rank=4, batches=[batch], task_type="SEQ_CLS").eval()
    torch.testing.assert_close(outputs(model, batch), expected, atol=1e-4, rtol=1e-4)
    layer = model.get_base_model().bert.pooler.dense
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(product.double(), covariance_start(rows, weight), atol=1e-3, rtol=1e-3)


def test_how_a_batch_is_divided_makes_no_difference():
    ids = tokens(6, 12)
    starts = [
        factors(evatune.prepare(bert(), method="corda", rank=4, batches=[{"input_ids": part} for part in ids.split(n)]))
        for n in (1, 3, 6)
    ]
    for other in starts[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in starts[0].items())


def test_nothing_is_left_on_the_modules():
    base = bert()
    before = {name: set(vars(module)) for name, module in base.named_modules()}
    model = evatune.prepare(base, method="corda", rank=4, batches=[{"input_ids": tokens(6, 12)}])
    for name, module in model.get_base_model().named_modules():
        inner = module.base_layer if hasattr(module, "base_layer") else module
        if name in before and name != "classifier":  # which is trained whole
            assert set(vars(inner)) <= before[name] | {"peft_config"}, name


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.first(x)


def test_what_no_row_reaches_is_named_before_anything_changes():
    base = Branches()
    weights = [parameter.clone() for parameter in base.parameters()]
    with pytest.raises(EvaError, match=r"no row of the batches reaches 'second', .*; leave them out"):
        evatune.prepare(base, method="corda", rank=2, batches=[torch.randn(5, 8)])
    with pytest.raises(EvaError, match=r"what enters 'first' is not finite"):
        evatune.prepare(base, method="corda", rank=2, batches=[torch.full((5, 8), float("nan"))])
    assert [type(module) for module in base.children()] == [nn.Linear, nn.Linear]
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), weights, strict=True))
    evatune.prepare(base, method="corda", rank=2, batches=[torch.randn(5, 8)], exclude_modules=["second"])


@pytest.mark.on_cpu("it brings a device of its own, on which it counts")
def test_the_host_waits_for_no_single_example():
    waits = []
    with fake_device.fake_device() as device:
        for n in (1, 4):
            fake_device.waits.clear()
            batches = [torch.randn(5, 8, device="cpu") for _ in range(n)]
            evatune.prepare(
                Branches().to(device),
                method="corda",
                rank=2,
                batches=batches,
                exclude_modules=["second"],
                max_batches=n,
            )
            waits.append(sum(count for place, count in fake_device.waits.items() if "adapters/corda" in place))
    assert waits == [1, 1]


def test_examples_are_cut_by_the_mask_of_their_side():
    ids, labels = tokens(2, 6), tokens(2, 6, seed=1)
    mask, decoder_mask = torch.ones_like(ids), torch.ones_like(ids)
    mask[0, 4:], decoder_mask[1, 3:], labels[0, 5:] = 0, 0, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    first, second = examples(batch, encoder_decoder=True)
    assert (first["input_ids"].shape, first["labels"].shape) == ((1, 4), (1, 5))
    assert (second["input_ids"].shape, second["labels"].shape) == ((1, 6), (1, 6))
    given = batch | {"decoder_input_ids": ids, "decoder_attention_mask": decoder_mask}
    assert [e["decoder_input_ids"].shape for e in examples(given, encoder_decoder=True)] == [(1, 6), (1, 3)]
    assert [e["labels"].shape for e in examples(batch)] == [(1, 4), (1, 6)]  # of a decoder: one sequence
