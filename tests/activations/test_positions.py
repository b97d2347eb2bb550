"""Which positions of a batch count: every shape of mask and label."""

from __future__ import annotations

import pytest
import torch

from evatune import EvaError
from evatune.activations.positions import read_positions
from evatune.activations.rows import select
from evatune.activations.variants import lengthened, perturbed, ragged, shortened, without_padding

B, T, D = 3, 5, 4
MASK = (torch.arange(T) < torch.tensor([5, 2, 3])[:, None]).long()
IDS = torch.arange(B * T).reshape(B, T) + 1
LABELS = torch.where((MASK == 1) & (torch.arange(T) > 0), IDS, -100)


def only(batch, **options):
    (sequence,) = read_positions(batch, **options).sequences
    return sequence


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.uint8])
def test_padding_does_not_count(dtype):
    assert torch.equal(only({"attention_mask": MASK.to(dtype)}).counted, MASK.bool())


def test_without_a_mask_all_positions_count():
    assert only({"input_ids": IDS}).counted.all() and only({"inputs_embeds": torch.zeros(B, T, D)}).counted.shape == (
        B,
        T,
    )
    for batch in (torch.zeros(B, T), (torch.zeros(B, T), torch.zeros(B)), {"x": torch.zeros(B, T)}):
        assert read_positions(batch).all_count and not read_positions(batch).sequences


def test_choices_have_positions_of_their_own():
    mask = torch.stack([MASK, MASK.flip(0)])
    assert only({"input_ids": torch.stack([IDS, IDS]), "attention_mask": mask}).kept.shape == (2, B, T)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("n_heads", [None, 1, 2])
def test_masks_of_pairs_keep_what_is_attended_to(n_heads, additive):
    pairs = MASK[:, None].bool() & torch.ones(T, T, dtype=torch.bool).tril() & MASK[:, :, None].bool()
    if n_heads is not None:
        pairs = pairs[:, None].expand(B, n_heads, T, T)
    mask = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min) if additive else pairs
    assert torch.equal(only({"input_ids": IDS, "attention_mask": mask}).kept, MASK.bool())


def test_masks_in_the_way_of_pytorch_are_true_at_padding():
    batch = {"src": torch.zeros(B, T, D), "src_key_padding_mask": MASK == 0}
    assert torch.equal(only(batch).kept, MASK.bool()) and only(batch).entries == ("src",)


def test_masks_that_are_not_understood_are_named():
    assert read_positions({"pixel_values": torch.zeros(B, 3, T, T), "pixel_mask": MASK}).unread == ("pixel_mask",)
    patches = read_positions({"pixel_values": torch.zeros(B, T, 5), "pixel_attention_mask": MASK})
    assert patches.unread == () and torch.equal(patches.sequences[0].kept, MASK.bool())
    others = read_positions({"pixel_values": torch.zeros(B, 3, 9, 9), "pixel_attention_mask": MASK})
    assert others.unread == ("pixel_attention_mask",)


def test_a_mask_of_nothing_in_the_batch_says_nothing():
    batch = {"input_ids": IDS, "attention_mask": MASK, "global_attention_mask": torch.zeros(B, T)}
    assert torch.equal(only(batch).kept, MASK.bool())


def test_entries_belong_to_the_sequence_with_their_prefix():
    batch = {
        "input_ids": IDS,
        "token_type_ids": IDS * 0,
        "attention_mask": MASK,
        "decoder_input_ids": IDS,
        "visual_embeds": torch.zeros(B, T, D),
        "visual_attention_mask": MASK.flip(0),
        "labels": IDS,
    }
    owned = {sequence.masks: sequence.entries for sequence in read_positions(batch, encoder_decoder=True).sequences}
    assert owned == {
        ("attention_mask",): ("input_ids", "token_type_ids"),
        ("visual_attention_mask",): ("visual_embeds",),
        (): ("decoder_input_ids",),
    }


# -- labels -----------------------------------------------------------------------------------------------------------


def test_labels_mask_on_request_only():
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    assert torch.equal(only(batch).counted, MASK.bool())


@pytest.mark.parametrize("loss_type", [None, "ForCausalLM", "ForConditionalGeneration"])
def test_a_next_token_is_learned_at_the_position_before(loss_type):
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    counted = only(batch, use_label_mask=True, loss_type=loss_type).counted
    assert torch.equal(counted[:, :-1], LABELS[:, 1:] != -100) and not counted[:, -1].any()


@pytest.mark.parametrize(("loss_type", "labels"), [(None, LABELS.where(LABELS == -100, 7)), ("ForMaskedLM", LABELS)])
def test_other_labels_are_learned_where_they_are(loss_type, labels):
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    assert torch.equal(only(batch, use_label_mask=True, loss_type=loss_type).counted, labels != -100)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, -100, 1]), torch.tensor([[0.0], [1.0], [-100.0]]), torch.full((B, 9), -100)], ids=str
)
def test_labels_that_are_not_per_position_mask_nothing(labels):
    assert torch.equal(only({"attention_mask": MASK, "labels": labels}, use_label_mask=True).counted, MASK.bool())


def test_a_label_mask_without_labels_is_an_error():
    for batch in ({"attention_mask": MASK}, torch.zeros(B, T), {"labels": [1, 2]}):
        with pytest.raises(EvaError, match="use_label_mask=True needs batches with 'labels', and this batch has none"):
            read_positions(batch, use_label_mask=True)


@pytest.mark.parametrize("use_label_mask", [False, True])
def test_labels_of_an_encoder_decoder_model_concern_its_decoder_alone(use_label_mask):
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "decoder_input_ids": IDS}
    first, second = read_positions(batch, encoder_decoder=True, use_label_mask=use_label_mask).sequences
    assert torch.equal(first.counted, MASK.bool()) and torch.equal(second.counted, LABELS != -100)


def test_a_decoder_mask_counts_more_than_ignored_labels():
    batch = {"input_ids": IDS, "labels": LABELS, "decoder_input_ids": IDS, "decoder_attention_mask": MASK}
    plain, asked = (
        read_positions(batch, encoder_decoder=True, use_label_mask=use).sequences[0].counted for use in (False, True)
    )
    assert torch.equal(plain, MASK.bool()) and torch.equal(asked, MASK.bool() & (LABELS != -100))


# -- the same batch, changed ------------------------------------------------------------------------------------------

BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "weight": torch.ones(B)}


def test_only_padding_gets_other_values():
    changed = perturbed(BATCH, read_positions(BATCH), reserved=frozenset([2]))
    ids = changed["input_ids"]
    assert torch.equal(ids[MASK == 1], IDS[MASK == 1]) and (ids != IDS)[MASK == 0].all()
    assert set(ids[MASK == 0].tolist()) <= set(IDS[MASK == 1].tolist()) - {2}
    assert torch.equal(BATCH["input_ids"], IDS), "the caller's batch stays"
    embeds = {"inputs_embeds": torch.randn(B, T, D), "attention_mask": MASK}
    moved = perturbed(embeds, read_positions(embeds))["inputs_embeds"] != embeds["inputs_embeds"]
    assert torch.equal(moved.all(-1), MASK == 0) and torch.equal(moved.any(-1), MASK == 0)


def test_longer_and_shorter_batches():
    longer, more = lengthened(BATCH, read_positions(BATCH))
    assert more == [1] and longer["input_ids"].shape == (B, T + 1) and not longer["attention_mask"][:, T:].any()
    assert (longer["labels"][:, T:] == -100).all() and torch.equal(longer["input_ids"][:, :T], IDS)
    shorter, fewer = shortened(BATCH, read_positions(BATCH))
    assert fewer == [-3] and torch.equal(shorter["input_ids"], IDS[:, :2])


def test_parts_hold_every_kept_position_once_and_nothing_else():
    parts = list(without_padding(BATCH, read_positions(BATCH)))
    assert sorted(torch.cat([part["input_ids"].flatten() for part in parts]).tolist()) == IDS[MASK == 1].tolist()
    assert all(part["attention_mask"].all() and len(part["weight"]) == len(part["input_ids"]) for part in parts)


def test_what_cannot_be_cut_is_not():
    hole = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 0, 1, 1, 1]] * B)}
    assert without_padding(hole, read_positions(hole)) is None
    other = BATCH | {"pictures": torch.zeros(7, 2)}
    assert without_padding(other, read_positions(other)) is None


def test_a_batch_without_padding_gets_some_for_comparison():
    batch = {"input_ids": IDS}
    changed, positions = ragged(batch, read_positions(batch), takes=lambda name: name == "attention_mask")
    kept = positions.sequences[0].kept
    assert torch.equal(changed["attention_mask"].bool(), kept) and not kept.all() and kept.any(dim=1).all()


def test_selected_rows_are_those_of_all_masks():
    x = torch.randn(B, T, D)
    assert torch.equal(select(x, None), x.reshape(-1, D))
    assert torch.equal(select(x, MASK.bool(), LABELS != -100), x[MASK.bool() & (LABELS != -100)])
