"""Rows of padding, however a model lays out its positions: what is counted against the rows that plain hooks see."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LongformerConfig, LongformerModel, MambaConfig, MambaForCausalLM

from evatune import EvaError, EvaWarning, measure
from evatune.activations.padding import fingerprint

D = 8
QUIET = {"progress": False, "tau": None, "min_gain": None, "n_components": 4}


def ids_and_mask(lengths, *, length, seed=0, left=False):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": torch.randint(1, 40, mask.shape, generator=generator) * mask, "attention_mask": mask}


class Net(nn.Module):
    """Token embeddings, linear layers by name, and what a test makes of them."""

    def __init__(self, run, *names):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, D)
        for name in names:
            setattr(self, name, nn.Linear(D, D))
        self.run = run

    def forward(self, input_ids, attention_mask=None, **others):
        return self.run(self, self.embed(input_ids), attention_mask, **others)


def attend(x, kept):
    """Attention without parameters, that masks its padding."""
    scores = (x @ x.mT).masked_fill(kept[:, None] == 0, -1e9)
    return x + scores.softmax(-1) @ x


def check(model, batches, name, rows_of):
    """Compare the count and the mean with the rows that `rows_of(activation, batch)` chooses, (n, d)."""
    kept = []
    module = model.get_submodule(name)
    for batch in batches:
        seen = []
        handle = module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        kept += [rows_of(activation, batch) for activation in seen]
    rows = torch.cat(kept)
    spectrum = measure(model, batches, target_modules=[name], **QUIET)[name]
    assert spectrum.n_rows == len(rows)
    torch.testing.assert_close(spectrum.mean, rows.mean(dim=0), rtol=1e-4, atol=1e-5)
    return spectrum


BATCHES = [ids_and_mask([7, 3, 5, 2], length=7, seed=0), ids_and_mask([1, 6, 4, 6], length=6, seed=1)]


@pytest.mark.parametrize("left", [False, True])
def test_plain_layout(left):
    batches = [ids_and_mask([7, 3, 5, 2], length=7, left=left)] * 2
    model = Net(lambda m, x, kept: m.a(attend(x, kept)), "a")
    spectrum = check(model, batches, "a", lambda x, batch: x[batch["attention_mask"].bool()])
    assert (spectrum.padding, spectrum.unsure_share) == ("dropped", 0)


def test_positions_that_become_several_rows():
    def run(m, x, kept):
        x = attend(x, kept)
        return m.a(torch.stack([x, x * 2], dim=2).flatten(1, 2))

    both = lambda x, batch: x[batch["attention_mask"].bool().repeat_interleave(2, dim=1)]  # noqa: E731
    check(Net(run, "a"), BATCHES, "a", both)


def test_copies_of_the_whole_sequence():
    model = Net(lambda m, x, kept: m.a(torch.cat([attend(x, kept)] * 3, dim=1)), "a")
    check(model, BATCHES, "a", lambda x, batch: x[batch["attention_mask"].bool().repeat(1, 3)])


def test_time_first_where_the_first_batch_cannot_tell():
    """Without ragged ends, (B, T) and (T, B) drop the same rows of the first batch and other rows of the second."""
    alike = ids_and_mask([4, 4, 4, 4, 4], length=5)
    alike["attention_mask"] = alike["attention_mask"] & alike["attention_mask"].T
    batches = [alike, ids_and_mask([5, 1, 2, 5, 3], length=5, seed=1)]
    model = Net(lambda m, x, kept: m.a(attend(x, kept).transpose(0, 1)), "a")
    check(model, batches, "a", lambda x, batch: x.transpose(0, 1)[batch["attention_mask"].bool()])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("n_others", [3, 9])
def test_text_and_pictures_in_one_sequence(first, n_others):
    def run(m, x, kept, picture):
        kept = torch.cat([kept.new_ones(len(x), n_others), kept][:: 1 if first else -1], dim=1)
        return m.a(attend(torch.cat([picture, x][:: 1 if first else -1], dim=1), kept))

    def kept_rows(x, batch):
        ones = torch.ones(len(x), n_others, dtype=torch.bool)
        return x[torch.cat([ones, batch["attention_mask"].bool()][:: 1 if first else -1], dim=1)]

    batches = [batch | {"picture": torch.randn(4, n_others, D)} for batch in BATCHES]
    check(Net(run, "a"), batches, "a", kept_rows)


def test_text_and_regions_with_a_mask_of_their_own():
    def run(m, x, kept, visual_embeds, visual_attention_mask):
        return m.a(attend(torch.cat([x, visual_embeds], dim=1), torch.cat([kept, visual_attention_mask], dim=1)))

    regions = {"visual_embeds": torch.randn(4, 5, D), "visual_attention_mask": torch.ones(4, 5, dtype=torch.long)}
    spectra = measure(Net(run, "a"), [batch | regions for batch in BATCHES], target_modules=["a"], **QUIET)
    assert spectra["a"].n_rows == 17 + 17 + 2 * 4 * 5


@pytest.mark.parametrize("n_patches", [3, 7, 6])
def test_a_tower_of_its_own_keeps_all_its_rows(n_patches):
    def run(m, x, kept, picture):
        return m.a(attend(x, kept)).mean(1) + m.b(picture).mean(1)

    batches = [batch | {"picture": torch.randn(4, n_patches, D)} for batch in BATCHES]
    spectrum = check(Net(run, "a", "b"), batches, "b", lambda x, batch: x.flatten(0, 1))
    assert spectrum.padding == "none"


def test_a_picture_that_looks_at_the_text_keeps_all_its_rows():
    """As many patches as positions, and they change with the text, but not with its padding."""

    def run(m, x, kept, picture):
        scores = (picture @ x.mT).masked_fill(kept[:, None] == 0, -1e9)
        return m.a(picture + scores.softmax(-1) @ x)

    batches = [batch | {"picture": torch.randn(*batch["input_ids"].shape, D)} for batch in BATCHES]
    model = Net(run, "a")
    spectra = measure(model, batches, target_modules=["a"], **QUIET)
    assert spectra["a"].n_rows == 4 * (7 + 6)


def test_hidden_states_that_are_zero_at_padding():
    """Values at padding reach no row, so they cannot tell; the number of rows of a longer batch does."""
    model = Net(lambda m, x, kept: m.a(x * kept[..., None]), "a")
    check(model, BATCHES, "a", lambda x, batch: x[batch["attention_mask"].bool()])


def test_pooled_vectors_all_count():
    model = Net(lambda m, x, kept: m.a((x * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)), "a")
    check(model, BATCHES * 2, "a", lambda x, batch: x)


def test_frames_that_a_sequence_is_shortened_to():
    """Two positions make a frame; frames of padding alone are set to zero, so only cutting the samples tells."""

    def run(m, x, kept):
        frames = x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2)
        n_frames = kept.sum(1) // 2
        inside = torch.arange(frames.shape[1]) < n_frames[:, None]
        frames = frames.masked_fill(~inside[..., None], 0.0)
        return m.a(attend(frames, inside))

    batches = [ids_and_mask([16, 6, 10, 4], length=16, seed=seed) for seed in range(2)]
    spectra = measure(Net(run, "a"), batches, target_modules=["a"], **QUIET)
    assert (spectra["a"].n_rows, spectra["a"].padding) == (2 * (8 + 3 + 5 + 2), "removed")


def test_recurrent_cells():
    def run(m, x, kept):
        state = x.new_zeros(len(x), D)
        for t in range(x.shape[1]):
            state = torch.tanh(m.a(x[:, t]) + m.b(state))
        return state

    spectra = measure(Net(run, "a", "b"), BATCHES, target_modules=["a", "b"], **QUIET)
    assert [spectra[name].n_rows for name in "ab"] == [17 + 17, 17 + 17]


def test_experts_that_are_linear_layers_get_no_padding():
    def run(m, x, kept):
        x = attend(x, kept).flatten(0, 1)
        choice = (x.sum(1) > 0).long()
        y = x.clone()
        for number, expert in enumerate((m.a, m.b)):
            index = (choice == number).nonzero().squeeze(1)
            y[index] = expert(x[index])
        return y

    model, n_rows = Net(run, "a", "b"), 0
    spectra = measure(model, BATCHES, target_modules=["a", "b"], **QUIET)
    n_rows = sum(spectra[name].n_rows for name in "ab")
    assert n_rows == 17 + 17


def test_a_model_that_reads_its_padding_gets_none():
    model = Net(lambda m, x, kept: m.a(x + x.mean(1, keepdim=True)), "a")
    spectra = measure(model, BATCHES, target_modules=["a"], **QUIET)
    assert (spectra["a"].n_rows, spectra["a"].padding) == (17 + 17, "removed")


def test_what_cannot_be_known_is_said():
    """Padding in the middle cannot be cut out, and every row changes with it."""
    batch = ids_and_mask([7, 3, 5, 2], length=7)
    batch["attention_mask"][:, 1] = 0
    model = Net(lambda m, x, kept: m.a(x + x.mean(1, keepdim=True)), "a")
    with pytest.warns(
        EvaWarning, match=r"padding among the rows of 1 of 1 inputs cannot be recognized and counts \('a': 100% of its"
    ):
        spectra = measure(model, [batch] * 2, target_modules=["a"], **QUIET)
    assert (spectra["a"].n_rows, spectra["a"].padding, spectra["a"].unsure_share) == (56, "unknown", 1.0)


@pytest.mark.parametrize("padded", [False, True])
def test_sequences_that_are_filled_up_to_a_window(padded):
    torch.manual_seed(0)
    model = LongformerModel(
        LongformerConfig(
            vocab_size=40,
            hidden_size=D,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_window=8,
            max_position_embeddings=64,
        )
    ).eval()
    batches = [ids_and_mask([12, 5, 9, 3] if padded else [12] * 4, length=12, seed=seed) for seed in range(2)]
    spectra = measure(model, batches, target_modules=["intermediate.dense"], **QUIET)
    assert {spectrum.n_rows for spectrum in spectra.values()} == {2 * (29 if padded else 48)}


def test_state_space_models():
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=D, state_size=4, num_hidden_layers=2)).eval()
    spectra = measure(model, BATCHES, target_modules=["in_proj", "x_proj"], **QUIET)
    assert {spectrum.n_rows for spectrum in spectra.values()} == {17 + 17}


def test_the_caller_says_which_rows_count():
    model = Net(lambda m, x, kept, picture: m.a(x).mean(1) + m.b(picture).mean(1), "a", "b")
    batches = [batch | {"picture": torch.randn(*batch["input_ids"].shape, D)} for batch in BATCHES]
    options = QUIET | {"target_modules": ["a", "b"]}
    spectra = measure(model, batches, row_mask=lambda batch: {"a": batch["attention_mask"]}, **options)
    assert (spectra["a"].n_rows, spectra["b"].n_rows) == (34, 52)
    spectra = measure(model, batches, row_mask=lambda batch: batch["attention_mask"], **options)
    assert (spectra["a"].n_rows, spectra["b"].n_rows) == (34, 34)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"c": None}, "row_mask names 'c', which is no module"),
        ([[True]], "row_mask must give tensors, or None for all rows, and gives a list"),
    ],
)
def test_a_mask_of_the_caller_that_means_nothing_is_an_error(given, message):
    model = Net(lambda m, x, kept: m.a(x).mean(1), "a")
    with pytest.raises(EvaError, match=message):
        measure(model, BATCHES, row_mask=lambda batch: given, **QUIET)


def test_only_the_first_batch_with_padding_takes_more_passes():
    passes = []

    def run(m, x, kept):
        passes.append(x.shape)
        return m.a(attend(x, kept))

    full = ids_and_mask([7] * 4, length=7)
    measure(Net(run, "a"), [full, *BATCHES, full, *BATCHES], target_modules=["a"], **QUIET)
    assert len(passes) == 6 + 1


def test_label_masks_follow_the_layout_without_any_padding():
    batch = ids_and_mask([7] * 4, length=7)
    labels = torch.full((4, 7), -100)
    labels[:, 4:] = 3
    model = Net(
        lambda m, x, kept: m.a(attend(x, torch.ones(x.shape[:2]) if kept is None else kept).transpose(0, 1)), "a"
    )
    spectra = measure(model, [batch | {"labels": labels}] * 2, target_modules=["a"], use_label_mask=True, **QUIET)
    assert spectra["a"].n_rows == 2 * 4 * 3


def test_rows_are_compared_with_all_digits():
    precisions = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if "matmul" in function.__name__:
                precisions.append(torch.get_float32_matmul_precision())
            return function(*args, **(kwargs or {}))

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with Watch():
            fingerprint(torch.ones(3, 8))
        assert precisions == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
