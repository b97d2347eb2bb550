"""Packed rows: the same tokens, the same loss, the same spectra as those of single examples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evatune import measure
from evatune.errors import EvaError
from evatune.models import load_model
from evatune.recipe import load_recipe
from evatune.tasks.generation.encoding import IGNORED
from evatune.tasks.generation.packing import check_keeps_apart, pack, row_mask
from evatune.tasks.task import batches
from evatune.training import finetune
from evatune.training.setup import open_recipe

ROWS = [{"input_ids": list(range(10 * n, 10 * n + n)), "labels": list(range(n))} for n in (5, 3, 2, 6, 4)]


def opened(model, data, **overrides):
    settings = {"model": str(model), "data": str(data / "train.jsonl"), "precision": "fp32", "max_length": 128}
    return open_recipe(load_recipe(None, settings | overrides))


def test_every_example_is_in_one_row_whole_and_no_row_is_too_long():
    packed = list(pack(ROWS, length=8))
    assert all(len(row["input_ids"]) <= 8 for row in packed)
    tokens = [sorted(token for row in rows for token in row["input_ids"]) for rows in (packed, ROWS)]
    assert tokens[0] == tokens[1]
    assert len(packed) == 3  # 20 tokens: 5 + 3, 2 + 6, 4
    assert packed[0]["position_ids"] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert packed[0]["labels"] == [IGNORED, 1, 2, 3, 4, IGNORED, 1, 2]  # the first token of an example is not predicted


def test_few_rows_wait_so_that_the_order_stays_about_the_same():
    packed = list(pack([{"input_ids": [n] * 60, "labels": [n] * 60} for n in range(200)], length=100))
    assert sorted(row["input_ids"][0] for row in packed) == list(range(200))
    assert all(abs(row["input_ids"][0] - place) <= 64 for place, row in enumerate(packed))


def test_the_mask_leaves_out_padding_alone(tiny_model, tiny_data):
    task = opened(tiny_model, tiny_data, packing=True)
    first = task.train.rows[0]
    rows = [*task.train.rows[:3], {name: values[:20] for name, values in first.items()}]
    batch = task.collate(rows)
    assert "attention_mask" not in batch
    assert row_mask(batch).sum(1).tolist() == [len(row["input_ids"]) for row in rows]


def test_packed_rows_have_the_loss_of_single_examples(tiny_model, tiny_data):
    single, packed = opened(tiny_model, tiny_data), opened(tiny_model, tiny_data, packing=True)
    assert len(packed.train) < 0.6 * len(single.train)
    assert "packed into" in packed.summary() and packed.facts()["train_rows"] == len(packed.train)
    model = packed.load_model()

    def total(task):
        found = [task.collate([row]) for row in task.train.rows]
        counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in found]
        with torch.no_grad():
            losses = [count * float(model(**batch).loss) for count, batch in zip(counts, found, strict=True)]
        return sum(losses), sum(counts)

    (loss_single, n_single), (loss_packed, n_packed) = total(single), total(packed)
    assert n_single == n_packed
    assert loss_packed == pytest.approx(loss_single, rel=1e-5)


@pytest.mark.parametrize("use_label_mask", [False, True])
def test_packed_rows_have_the_spectra_of_single_examples(use_label_mask, tiny_model, tiny_data, largest_angle):
    found = []
    for packing in (False, True):
        task = opened(tiny_model, tiny_data, packing=packing)
        model = load_model(tiny_model)
        needs = task.needs(model)
        mask = needs.learned_mask if use_label_mask else needs.row_mask
        options = {"row_mask": mask, "use_label_mask": use_label_mask, "n_components": 4}
        found.append(
            measure(
                model,
                batches(task, batch_size=4, seed=0),
                backend="exact",
                tau=None,
                min_gain=None,
                progress=False,
                **options,
            )
        )
    single, packed = found
    assert single.inputs.keys() == packed.inputs.keys()
    for name, spectrum in single.inputs.items():
        other = packed.inputs[name]
        assert spectrum.n_rows == other.n_rows
        assert torch.allclose(spectrum.singular_values, other.singular_values, rtol=1e-4)
        assert torch.allclose(spectrum.mean, other.mean, atol=1e-5)
        assert largest_angle(spectrum.components, other.components) < 1e-2


class Inside(nn.Module):
    """A model inside another one, which may spoil what it is called with."""

    def __init__(self, model) -> None:
        super().__init__()
        self.inner = model

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()


class Mixing(Inside):
    def forward(self, input_ids, position_ids):
        return self.inner(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids)


class MixingInLargerBatches(Inside):
    """What flash attention of transformers does: it looks for packed examples in batches of one row only."""

    def forward(self, input_ids, position_ids):
        mask = torch.ones_like(input_ids) if len(input_ids) > 1 else None
        return self.inner(input_ids=input_ids, attention_mask=mask, position_ids=position_ids)


class WithoutPositions(Inside):
    def forward(self, input_ids):
        return self.inner(input_ids=input_ids)


def test_a_model_that_mixes_examples_is_refused(tiny_model):
    model = load_model(tiny_model)
    with pytest.raises(EvaError, match=r"LlamaForCausalLM lets examples of one row see each other"):
        check_keeps_apart(model)  # with a cache, transformers does not look for packed rows
    model.config.use_cache = False
    check_keeps_apart(model)
    for mixing in (Mixing, MixingInLargerBatches):
        match = rf"{mixing.__name__} lets examples of one row see each other \(logits differ by \d+%\)"
        with pytest.raises(EvaError, match=match):
            check_keeps_apart(mixing(model))
    with pytest.raises(EvaError, match=r"WithoutPositions takes no position_ids, so examples of one row would see"):
        check_keeps_apart(WithoutPositions(model))


def test_what_makes_no_sense_is_refused(tiny_model, tiny_data):
    with pytest.raises(EvaError, match=r"data\.packing fills rows already"):
        opened(tiny_model, tiny_data, packing=True, bucketing=True)
    recipe = load_recipe(None, {"model": str(tiny_model), "data": str(tiny_data / "train.jsonl"), "packing": True})
    with pytest.raises(EvaError, match="a packed row has examples of several kinds"):
        open_recipe(recipe).kinds()


@pytest.mark.parametrize("how", ["packing", "bucketing"])
def test_a_run(how, tiny_model, tiny_data, tmp_path):
    settings = {"model": str(tiny_model), "data": str(tiny_data / "train.jsonl"), "output": str(tmp_path / "run")}
    settings |= {"rank": 2, "steps": 3, "train.batch_size": 2, "max_batches": 2, "max_length": 128, how: True}
    record = finetune(load_recipe(None, settings | {"precision": "fp32"}), progress=False)
    assert record.steps == 3 and record.data["train"] == 60


def test_bucketing_puts_examples_of_like_length_into_a_batch(tiny_model, tiny_data):
    task = opened(tiny_model, tiny_data, bucketing=True)
    assert task.needs(None).arguments == {"train_sampling_strategy": "group_by_length"}
