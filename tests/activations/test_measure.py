"""`measure` against plain hooks and scikit-learn, for every kind of model and batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import BatchEncoding

from evatune import EvaError, EvaWarning, Spectra, measure


def by_attention_mask(name, batch):
    return batch["attention_mask"]


def test_llama_with_padding(build, batches_for, observe, quiet):
    model, batches = build("llama"), batches_for("llama")
    spectra = measure(model, batches, **quiet)
    seen = observe(model, batches, spectra, select=by_attention_mask)
    assert len(spectra) == 14 and "lm_head" not in spectra
    for name in spectra:
        seen.check(name, spectra[name])
    assert spectra.targets["model.layers.0.mlp.down_proj"].in_features == 48
    assert {s.stopped for s in spectra.inputs.values()} == {"data exhausted"}
    assert {s.n_batches for s in spectra.inputs.values()} == {3}


@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_every_backend_measures_the_same(build, batches_for, observe, quiet, backend):
    model, batches = build("llama"), batches_for("llama")
    spectra = measure(model, batches, backend=backend, **quiet)
    seen = observe(model, batches, spectra, select=by_attention_mask)
    for name in spectra:
        # Rows narrower than a sketch would be are followed exactly.
        assert spectra[name].backend == ("exact" if backend == "sketch" else backend)
        seen.check(name, spectra[name], n_compared=1, rtol=0.05 if backend == "incremental" else 2e-3)


def test_uncentred_spectra_are_of_the_second_moment(build, batches_for, observe, quiet):
    model, batches = build("llama"), batches_for("llama")
    spectra = measure(model, batches, center=False, **quiet)
    seen = observe(model, batches, spectra, select=by_attention_mask)
    for name in spectra:
        rows = seen.matrix(name)
        values = np.linalg.eigvalsh(rows.T @ rows)[::-1]
        np.testing.assert_allclose(spectra[name].singular_values.square(), values[:6], rtol=1e-3)


def test_gpt2_with_its_conv1d_layers(build, batches_for, observe, quiet):
    model, batches = build("gpt2"), batches_for("gpt2")
    spectra = measure(model, batches, **quiet)
    seen = observe(model, batches, spectra, select=by_attention_mask)
    assert set(spectra) == {
        f"transformer.h.{i}.{n}" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for name in spectra:
        seen.check(name, spectra[name])
    target = spectra.targets["transformer.h.1.attn.c_attn"]
    assert (target.in_features, target.out_features) == (32, 96)


@pytest.mark.parametrize("use_label_mask", [False, True])
def test_sequence_classification_with_one_label_a_sequence(build, batches_for, observe, quiet, use_label_mask):
    model, batches = build("bert"), batches_for("bert")
    spectra = measure(model, batches, use_label_mask=use_label_mask, **quiet)
    seen = observe(
        model, batches, spectra, select=lambda name, batch: None if "pooler" in name else batch["attention_mask"]
    )
    for name in spectra:
        seen.check(name, spectra[name])
    assert spectra["bert.pooler.dense"].n_rows == 18, "one row a sequence, no padding"


@pytest.mark.parametrize("length", [12, 16], ids=["T != T'", "other T"])
def test_encoder_decoder(build, batches_for, observe, quiet, length):
    model, batches = build("t5"), batches_for("t5", length=length)
    spectra = measure(model, batches, **quiet)

    def select(name, batch):
        crosses = "EncDecAttention.k" in name or "EncDecAttention.v" in name
        return batch["labels"] != -100 if name.startswith("decoder") and not crosses else batch["attention_mask"]

    seen = observe(model, batches, spectra, select=select)
    assert any(name.startswith("decoder") for name in spectra)
    for name in spectra:
        seen.check(name, spectra[name])


def test_cross_attention_keys_are_masked_as_the_encoder_where_both_lengths_agree(build, batches_for, observe, quiet):
    """With T == T' shapes cannot tell the two masks apart: what the decoder reads of the encoder is the encoder's."""
    model, batches = build("t5"), batches_for("t5")
    for batch in batches:
        batch["labels"] = batch["input_ids"].flip(0).masked_fill(batch["attention_mask"].flip(0) == 0, -100)
    spectra = measure(model, batches, **quiet)

    def select(name, batch):
        crosses = "EncDecAttention.k" in name or "EncDecAttention.v" in name
        return batch["labels"] != -100 if name.startswith("decoder") and not crosses else batch["attention_mask"]

    seen = observe(model, batches, spectra, select=select)
    for name in spectra:
        seen.check(name, spectra[name])


def test_vision_batches(build, batches_for, observe, quiet):
    model, batches = build("vit"), batches_for("vit")
    spectra = measure(model, batches, target_modules="all-linear", **quiet)
    seen = observe(model, batches, spectra)
    assert {s.n_rows for s in spectra.inputs.values()} == {3 * 6 * 17}
    for name in spectra:
        seen.check(name, spectra[name])


def test_positions_of_ones_own_choice(build, batches_for, observe, quiet):
    """Every fourth token of a picture, which no mask in a batch of pictures could tell."""
    model, batches = build("vit"), batches_for("vit")

    def chosen(batch):
        return (torch.arange(17) % 4 == 0).expand(len(batch["pixel_values"]), -1)

    spectra = measure(model, batches, row_mask=chosen, **quiet)
    seen = observe(model, batches, spectra, select=lambda name, batch: chosen(batch))
    assert {s.n_rows for s in spectra.inputs.values()} == {3 * 6 * 5}
    for name in spectra:
        seen.check(name, spectra[name])


def test_the_label_mask_is_obeyed(build, batches_for, observe, quiet):
    model, batches = build("llama"), batches_for("llama")
    spectra = measure(model, batches, use_label_mask=True, **quiet)
    before_a_label = lambda name, batch: (batch["labels"] != -100).roll(-1, dims=1)  # noqa: E731 - the first has none
    seen = observe(model, batches, spectra, select=before_a_label)
    everything = measure(model, batches, **quiet)
    for name in spectra:
        seen.check(name, spectra[name])
        assert spectra[name].n_rows < everything[name].n_rows


def test_labels_beside_embeddings_mask_too(build, batches_for, quiet):
    model, batches = build("llama"), batches_for("llama")
    embedded = [
        {"inputs_embeds": model.model.embed_tokens(b["input_ids"]).detach(), "labels": b["labels"]} for b in batches
    ]
    spectra = measure(model, embedded, use_label_mask=True, **quiet)
    kept = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert {s.n_rows for s in spectra.inputs.values()} == {kept}


def same(first, second):
    assert list(first) == list(second)
    assert {n: t.input for n, t in first.targets.items()} == {n: t.input for n, t in second.targets.items()}
    for name in first:
        assert first[name].n_rows == second[name].n_rows
        for part in ("components", "singular_values", "mean"):
            assert torch.equal(getattr(first[name], part), getattr(second[name], part)), (name, part)


def test_equal_seed_equal_result_bit_for_bit(build, batches_for, quiet):
    for backend in ("exact", "sketch", "incremental"):
        runs = [
            measure(build("llama"), batches_for("llama"), **quiet | {"backend": backend, "seed": 5}) for _ in range(2)
        ]
        same(*runs)


class Endless(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches


def as_tuple(batches):
    return [(batch, batch["labels"]) for batch in batches]


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda batches: batches, id="list of dicts"),
        pytest.param(tuple, id="tuple of dicts"),
        pytest.param(lambda batches: [BatchEncoding(batch) for batch in batches], id="BatchEncoding"),
        pytest.param(lambda batches: (batch for batch in batches), id="generator"),
        pytest.param(iter, id="iterator"),
        pytest.param(lambda batches: DataLoader(Endless(batches), batch_size=None), id="IterableDataset"),
        pytest.param(lambda batches: DataLoader(batches, batch_size=None), id="DataLoader"),
        pytest.param(lambda batches: [{**b, "text": ["a"], "idx": "x", "odd": 3} for b in batches], id="extra entries"),
        pytest.param(as_tuple, id="tuples of inputs and labels"),
    ],
)
def test_the_container_of_batches_makes_no_difference(build, batches_for, quiet, wrap):
    model, batches = build("llama"), batches_for("llama")
    same(measure(model, wrap(batches), **quiet), measure(model, batches, **quiet))


def test_embeddings_instead_of_tokens(build, batches_for, quiet):
    model, batches = build("llama"), batches_for("llama")
    embedded = [
        {"inputs_embeds": model.model.embed_tokens(b["input_ids"]).detach(), "attention_mask": b["attention_mask"]}
        for b in batches
    ]
    same(measure(model, embedded, **quiet), measure(model, batches, **quiet))


def test_tensors_and_tuples_that_start_with_one(build, batches_for, quiet):
    model = build("llama")
    tokens = [batch["input_ids"] for batch in batches_for("llama")]
    expected = measure(model, [{"input_ids": ids} for ids in tokens], **quiet)
    same(measure(model, tokens, **quiet), expected)
    same(measure(model, [(ids, torch.zeros(6)) for ids in tokens], **quiet), expected)
    same(measure(model, [[ids, torch.zeros(6)] for ids in tokens], **quiet), expected)


def test_a_forward_of_ones_own_calls_the_model(build, batches_for, quiet):
    model, batches = build("llama"), batches_for("llama")
    wrapped = [{"prompt": batch} for batch in batches]

    def forward(given, batch):
        assert given is model
        return given(input_ids=batch["prompt"]["input_ids"], attention_mask=batch["prompt"]["attention_mask"])

    spectra = measure(model, wrapped, forward=forward, **quiet)
    assert {s.n_rows for s in spectra.inputs.values()} == {3 * 6 * 12}, "it says nothing of a mask"


def test_a_model_that_is_no_transformer(observe, quiet):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 2))
    batches = [torch.randn(40, 10) for _ in range(4)]
    spectra = measure(model, batches, target_modules=["0", "2"], **quiet)
    seen = observe(model, batches, spectra, forward=lambda model, batch: model(batch))
    for name in spectra:
        seen.check(name, spectra[name])
    assert spectra.model_name == "Sequential"


def test_flattened_activations_are_masked_by_position(quiet):
    """Mixtures of experts and other layers that see (B·T, d)."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x, attention_mask=None):
            return self.fc(x.reshape(-1, 8))

    x = torch.randn(5, 7, 8)
    mask = torch.arange(7) < torch.tensor([[7], [3], [1], [5], [2]])
    spectra = measure(Flat(), [{"x": x, "attention_mask": mask.long()}], target_modules=["fc"], **quiet)
    assert spectra["fc"].n_rows == int(mask.sum())
    torch.testing.assert_close(spectra["fc"].mean, x[mask].mean(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_autocast_concerns_the_model_and_not_the_sums(build, batches_for, observe, quiet, backend):
    model, batches = build("llama"), batches_for("llama")
    spectra = measure(model, batches, dtype=torch.bfloat16, backend=backend, **quiet | {"tau": 0.99, "min_gain": 0.01})

    def forward(model, batch):
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
            return model(**batch)

    seen = observe(model, batches, spectra, select=by_attention_mask, forward=forward)
    for name in spectra:
        assert spectra[name].components.dtype == torch.float32
        gram = spectra[name].components @ spectra[name].components.T
        torch.testing.assert_close(gram, torch.eye(6), rtol=0, atol=1e-5)
        seen.check(name, spectra[name], n_compared=1, rtol=0.05 if backend == "incremental" else 2e-3)


def test_a_half_precision_model_is_measured(build, batches_for, quiet):
    model, batches = build("llama"), batches_for("llama")
    plain = measure(model, batches, **quiet)
    half = measure(model.bfloat16(), batches, **quiet)
    for name in plain:
        assert half[name].components.dtype == torch.float32
        assert half[name].total_variance == pytest.approx(plain[name].total_variance, rel=0.1)


@pytest.mark.on_hardware("its tensors have no inference mode")
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_callers_grad_mode_makes_no_difference(build, batches_for, quiet, context):
    model, batches = build("llama"), batches_for("llama")
    expected = measure(model, batches, **quiet)
    with context():
        spectra = measure(model, batches, **quiet)
    same(spectra, expected)


def test_the_device_of_the_states_may_be_given(build, batches_for, quiet):
    model, batches = build("llama"), batches_for("llama")
    default = measure(model, batches, **quiet)
    given = measure(model, batches, state_device="cpu", **quiet)
    assert (default.settings["state_device"], given.settings["state_device"]) == (None, "cpu")
    for key in default.inputs:
        assert torch.equal(default.inputs[key].components, given.inputs[key].components)


def test_components_that_miss_much_are_a_warning(quiet):
    """Rows without any structure are the worst case of a sketch."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(150, 2100, generator=generator) for _ in range(4)]
    model = nn.Sequential(nn.Linear(2100, 2))
    with pytest.warns(EvaWarning, match=r"components of 1 of 1 inputs seem to miss more than 1\.0% .* of '0' "):
        spectra = measure(model, batches, target_modules=["0"], tolerance=None, **quiet)
    assert spectra["0"].backend == "sketch" and 0.01 < spectra["0"].captured_error < 1
    exact = measure(model, batches, target_modules=["0"], backend="exact", **quiet)
    assert exact["0"].captured_error == 0.0


def test_settings_and_versions_are_kept(build, batches_for, quiet):
    spectra = measure(
        build("llama"), batches_for("llama"), target_modules={"q_proj"}, layers_to_transform=(1,), seed=4, **quiet
    )
    assert spectra.settings["target_modules"] == ["q_proj"] and spectra.settings["seed"] == 4
    assert spectra.settings["layers_to_transform"] == [1] and spectra.settings["exclude_modules"] is None
    assert spectra.settings["n_batches"] == 3
    assert {"evatune", "torch"} <= set(spectra.versions)
    assert spectra.model_name == "LlamaForCausalLM" and spectra.seconds > 0


def test_ranks_by_target_name_stop_and_keep_what_their_plan_needs(build, batches_for, tmp_path):
    model, batches = build("llama"), batches_for("llama")
    names = list(measure(model, batches, n_components=2, progress=False))
    ranks = {name: 1 + 5 * name.endswith("down_proj") for name in names}
    # Unevenly distributed ranks: the components that a plan needs converge at other batches than four of each input.
    options = {"rho": 1.0, "tau": 0.6, "min_gain": None, "progress": False}
    spectra = measure(model, batches, rank=dict(reversed(ranks.items())), **options)
    assert spectra.n_components == 6
    assert spectra.plan(ranks, 1.0).ranks == ranks
    stopped = {name: spectrum.stopped for name, spectrum in spectra.inputs.items()}
    uniform = measure(model, batches, rank=6, **options)
    assert stopped != {name: spectrum.stopped for name, spectrum in uniform.inputs.items()}
    loaded = Spectra.load(spectra.save(tmp_path / "spectra"))
    assert loaded.settings["rank"] == ranks and list(loaded.settings["rank"]) == names
    same = measure(model, batches, rank=dict.fromkeys(names, 6), **options)
    assert {n: s.stopped for n, s in same.inputs.items()} == {n: s.stopped for n, s in uniform.inputs.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.0.self_attn.q_proj": 0},
            r"rank of 'model\.layers\.0\.self_attn\.q_proj' is 0, but must be at least 1",
        ),
        (
            {"model.layers.0.self_attn.q_proj": True},
            r"rank of 'model\.layers\.0\.self_attn\.q_proj' is True, but must be a whole number",
        ),
        (
            {"model.layers.9.self_attn.q_proj": 2},
            r"rank names 'model\.layers\.9\.\S+', which is no target .did",
        ),
    ],
)
def test_ranks_that_fit_no_target_are_refused_before_any_batch(build, change, message):
    def no_batches():
        raise AssertionError("a batch was asked for")
        yield

    ranks = {f"model.layers.{n}.self_attn.q_proj": 2 for n in range(2)}
    first = dict([*ranks.items()][:1])
    with pytest.raises(EvaError, match=message):
        measure(build("llama"), no_batches(), target_modules=["q_proj"], rank=ranks | change, progress=False)
    with pytest.raises(EvaError, match=r"rank names no value for 1 targets, the first 'model\.layers\.1\."):
        measure(build("llama"), no_batches(), target_modules=["q_proj"], rank=first, progress=False)
    with pytest.raises(EvaError, match="n_components is 3, but rank 2 with rho 2 needs at least 4"):
        measure(build("llama"), no_batches(), target_modules=["q_proj"], rank=ranks, n_components=3, progress=False)
