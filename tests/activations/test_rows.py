"""Which rows count: every shape of mask, label and activation."""

from __future__ import annotations

import pytest
import torch

from evatune import EvaError
from evatune.activations.rows import RowMasks

B, T, D = 3, 5, 4
LENGTHS = torch.tensor([5, 2, 3])
MASK = (torch.arange(T) < LENGTHS[:, None]).long()
LABELS = torch.where((MASK == 1) & (torch.arange(T) > 0), 7, -100)
X = torch.arange(B * T * D, dtype=torch.float32).reshape(B, T, D)


def masks(batch, **settings):
    return RowMasks.of(batch, **{"encoder_decoder": False} | settings)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.uint8])
def test_padding_is_dropped(dtype):
    rows = masks({"attention_mask": MASK.to(dtype)}).select(X)
    assert torch.equal(rows, X[MASK.bool()])


def test_left_padding_is_dropped():
    assert torch.equal(masks({"attention_mask": MASK.flip(1)}).select(X), X[MASK.flip(1).bool()])


def test_without_a_mask_all_rows_count():
    everything = X.reshape(-1, D)
    assert torch.equal(masks({"input_ids": torch.zeros(B, T)}).select(X), everything)
    assert torch.equal(masks(torch.zeros(B, T)).select(X), everything)
    assert torch.equal(masks((torch.zeros(B, T), torch.zeros(B))).select(X), everything)
    assert torch.equal(masks({"attention_mask": torch.ones(B, T)}).select(X), everything)


def test_a_four_dimensional_mask_says_nothing_of_rows():
    batch = {"attention_mask": torch.zeros(B, 1, T, T), "input_ids": torch.zeros(B, T)}
    assert masks(batch).select(X).shape == (B * T, D)


def test_labels_mask_on_request_only():
    batch = {"attention_mask": MASK, "labels": LABELS}
    assert torch.equal(masks(batch).select(X), X[MASK.bool()])
    assert torch.equal(masks(batch, use_label_mask=True).select(X), X[LABELS != -100])


def test_padding_whose_label_counts_is_dropped_all_the_same():
    batch = {"attention_mask": MASK, "labels": torch.ones(B, T, dtype=torch.long)}
    assert torch.equal(masks(batch, use_label_mask=True).select(X), X[MASK.bool()])


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(torch.tensor([0, -100, 1]), id="one label a sequence"),
        pytest.param(torch.tensor([[0.0], [1.0], [-100.0]]), id="one score a sequence"),
        pytest.param(torch.zeros(B, T), id="multi-label, as many classes as positions"),
        pytest.param(torch.full((B, 9), -100), id="labels of another length"),
    ],
)
def test_labels_that_are_not_per_position_mask_nothing(labels):
    rows = masks({"attention_mask": MASK, "labels": labels}, use_label_mask=True).select(X)
    assert torch.equal(rows, X[MASK.bool()])


@pytest.mark.parametrize("given", ["attention_mask", "input_ids", "inputs_embeds"])
def test_labels_need_one_input_to_be_known_as_per_position(given):
    inputs = {
        "attention_mask": torch.ones(B, T),
        "input_ids": torch.zeros(B, T, dtype=torch.long),
        "inputs_embeds": torch.zeros(B, T, D),
    }
    rows = masks({given: inputs[given], "labels": LABELS}, use_label_mask=True).select(X)
    assert torch.equal(rows, X[LABELS != -100])


def test_a_label_mask_without_labels_is_an_error():
    for batch in ({"attention_mask": MASK}, torch.zeros(B, T), {"labels": [1, 2]}):
        with pytest.raises(EvaError, match="use_label_mask=True needs batches with 'labels', and this batch has none"):
            masks(batch, use_label_mask=True)


def test_a_tuple_that_starts_with_a_mapping_has_its_masks():
    assert torch.equal(masks(({"attention_mask": MASK}, torch.zeros(B))).select(X), X[MASK.bool()])
    assert torch.equal(masks([{"attention_mask": MASK}]).select(X), X[MASK.bool()])


def test_flattened_activations_are_masked_by_position():
    rows = masks({"attention_mask": MASK}).select(X.reshape(B * T, D))
    assert torch.equal(rows, X[MASK.bool()])


@pytest.mark.parametrize("shape", [(B, D), (B, T + 1, D), (B, T - 1, D), (B * 7, D), (B, 2, T, D), (T, B, D)], ids=str)
def test_activations_of_another_shape_are_taken_whole(shape):
    """Pooled vectors, image patches with a class token, windows of attention."""
    activation = torch.randn(shape)
    assert torch.equal(masks({"attention_mask": MASK}).select(activation), activation.reshape(-1, D))


def test_pooled_vectors_of_one_token_sequences_are_taken_whole():
    mask = torch.tensor([[1], [0], [1]])
    assert len(masks({"attention_mask": mask}).select(torch.randn(3, D))) == 3


def encoder_decoder_batch(n_positions):
    labels = torch.randint(1, 9, (B, n_positions))
    labels[0, 2:] = -100
    labels[2, 1:] = -100
    return {"attention_mask": MASK, "labels": labels}


@pytest.mark.parametrize("n_positions", [4, T], ids=["T != T'", "T == T'"])
def test_each_side_of_an_encoder_decoder_model_has_its_mask(n_positions):
    batch = encoder_decoder_batch(n_positions)
    both = masks(batch, encoder_decoder=True)
    decoder = torch.randn(B, n_positions, D)
    assert torch.equal(both.select(X), X[MASK.bool()])
    assert torch.equal(both.select(decoder, in_decoder=True), decoder[batch["labels"] != -100])
    # Inside the decoder, cross-attention sees encoder positions; other lengths give them away.
    if n_positions != T:
        assert torch.equal(both.select(X, in_decoder=True), X[MASK.bool()])
        assert torch.equal(both.select(decoder), decoder[batch["labels"] != -100])


def test_a_decoder_mask_counts_more_than_ignored_labels():
    batch = encoder_decoder_batch(4) | {"decoder_attention_mask": torch.tensor([[1, 1, 1, 1]] * 2 + [[1, 1, 0, 0]])}
    decoder = torch.randn(B, 4, D)
    plain = masks(batch, encoder_decoder=True).select(decoder, in_decoder=True)
    assert torch.equal(plain, decoder[batch["decoder_attention_mask"].bool()])
    masked = masks(batch, encoder_decoder=True, use_label_mask=True).select(decoder, in_decoder=True)
    assert torch.equal(masked, decoder[batch["decoder_attention_mask"].bool() & (batch["labels"] != -100)])


def test_the_label_mask_of_an_encoder_decoder_model_leaves_the_encoder_alone():
    batch = encoder_decoder_batch(T)
    rows = masks(batch, encoder_decoder=True, use_label_mask=True).select(X)
    assert torch.equal(rows, X[MASK.bool()])


def test_a_sequence_that_is_all_padding_gives_no_row():
    mask = MASK.clone()
    mask[1] = 0
    assert len(masks({"attention_mask": mask}).select(X)) == int(mask.sum())
    assert masks({"attention_mask": mask * 0}).select(X).shape == (0, D)
