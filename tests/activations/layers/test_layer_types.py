"""Every layer type against rows made in the plainest way, and against a float64 decomposition of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from evatune import EvaError, measure
from evatune.activations.layers import convolution
from evatune.activations.layers.convolution import ConvolutionType

CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3),
    nn.Conv1d(4, 6, 4, padding="same"),
    nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, padding_mode="circular"),
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, padding=(1, 2), groups=2, padding_mode="reflect"),
    nn.Conv2d(4, 4, 3, groups=4, padding="valid"),
    nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 0, 1), stride=(1, 2, 1), padding_mode="replicate"),
    nn.Conv2d(4, 6, (5, 3), padding="same"),
]
QUIET = {"progress": False, "tau": None, "min_gain": None, "n_components": 6}


def samples(n_dims, *, n=3, channels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, *(9, 8, 5)[:n_dims], generator=generator).cumsum(dim=-1)


def check_spectrum(spectrum, rows, *, n_compared=4):
    """Compare with the singular value decomposition of the rows in float64."""
    rows = rows.double().numpy()
    centred = rows - rows.mean(axis=0)
    _, singular_values, components = np.linalg.svd(centred, full_matrices=False)
    assert spectrum.n_rows == len(rows)
    assert spectrum.total_variance == pytest.approx((centred**2).sum() / (len(rows) - 1), rel=1e-4)
    k = len(spectrum.singular_values)
    np.testing.assert_allclose(spectrum.singular_values, singular_values[:k], rtol=1e-3, atol=1e-3 * singular_values[0])
    for j in range(n_compared):
        if singular_values[j] > 1.03 * singular_values[j + 1] and (
            j == 0 or singular_values[j - 1] > 1.03 * singular_values[j]
        ):
            assert abs(spectrum.components[j].double().numpy() @ components[j]) > 0.999, j


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("max_elements", [1 << 24, 200])
def test_rows_of_a_convolution_times_its_weight_are_its_output(module, max_elements, monkeypatch):
    monkeypatch.setattr(convolution, "MAX_ELEMENTS", max_elements)
    n_dims = len(module.kernel_size)
    x = samples(n_dims)
    rows = torch.cat(list(ConvolutionType().rows(module, x)))
    assert rows.shape[1] == ConvolutionType().features(module)[0]
    weights = module.weight.flatten(1).view(module.groups, -1, rows.shape[1])  # (G, out / G, in)
    grouped = rows.view(-1, module.groups, rows.shape[1])
    output = torch.einsum("ngd,god->ngo", grouped, weights).flatten(1) + module.bias
    torch.testing.assert_close(output, module(x).movedim(1, -1).reshape(output.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [CONVOLUTIONS[0], CONVOLUTIONS[3], CONVOLUTIONS[7]], ids=str)
def test_spectrum_of_a_convolution(module):
    model, n_dims = nn.Sequential(module), len(module.kernel_size)
    batches = [samples(n_dims, seed=seed) for seed in range(4)]
    spectra = measure(model, batches, target_modules=["0"], **QUIET)
    rows = [torch.cat(list(ConvolutionType().rows(module, x))) for x in batches]
    check_spectrum(spectra["0"], torch.cat(rows))
    assert spectra.targets["0"].out_features == 6


def test_one_sample_without_batch_dimension():
    module = CONVOLUTIONS[3]
    x = samples(2, n=1)
    with_batch, without = (next(ConvolutionType().rows(module, given)) for given in (x, x[0]))
    assert torch.equal(with_batch, without)


def test_patches_of_padding_alone_do_not_count():
    module = nn.Conv1d(4, 6, 3, stride=2, padding=1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0], [1] * 9])
    rows = next(ConvolutionType().rows(module, samples(1, n=2), [mask.bool()]))
    everything = next(ConvolutionType().rows(module, samples(1, n=2)))
    assert torch.equal(rows, everything[[0, 1, 5, 6, 7, 8, 9]])  # at 0, 2, 4, 6, 8; the third sees 3 to 5


def test_convolutions_of_one_geometry_share_an_input_and_others_do_not():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
            self.c = nn.Conv2d(4, 6, 3)

        def forward(self, x):
            return self.a(x), self.b(x), self.c(x)

    spectra = measure(Net(), [samples(2)] * 2, target_modules=["a", "b", "c"], **QUIET)
    assert [target.input for target in spectra.targets.values()] == ["a", "a", "c"]


def test_wrong_channels_are_named():
    with pytest.raises(EvaError, match=r"target '0' takes 4 channels, but its input is \(3, 5, 9, 8\)"):
        measure(nn.Sequential(CONVOLUTIONS[3]), [samples(2, channels=5)], target_modules=["0"], **QUIET)


# -- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
def test_an_embedding_is_measured_by_counts(build, batches_for, center):
    batches = batches_for("llama", 4)
    spectra = measure(build("llama"), batches, target_modules=["embed_tokens", "q_proj"], center=center, **QUIET)
    spectrum = spectra["model.embed_tokens"]
    tokens = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    rows = nn.functional.one_hot(tokens, 64)
    assert (spectrum.n_rows, spectrum.backend, spectrum.components.shape) == (len(tokens), "counts", (6, 64))
    if center:
        check_spectrum(spectrum, rows)
    else:
        counts = rows.sum(dim=0).sort(descending=True)
        assert torch.equal(spectrum.components.argmax(dim=1)[0], counts.indices[0])
        torch.testing.assert_close(spectrum.singular_values.square(), counts.values[:6].float())


def test_the_padding_token_of_an_embedding_does_not_count():
    model = nn.Sequential(nn.Embedding(10, 4, padding_idx=0))
    spectra = measure(
        model, [torch.tensor([[1, 2, 0, 0], [3, 1, 1, 2]])], target_modules=["0"], **QUIET | {"n_components": 3}
    )
    assert spectra["0"].n_rows == 6 and spectra["0"].mean[0] == 0


def test_an_embedding_stops_by_either_rule(build, batches_for):
    batches = batches_for("llama", 2, size=64, length=32) * 30
    for rule, reason in (({"min_gain": None}, "converged"), ({"tau": None}, "accurate")):
        spectra = measure(
            build("llama"), batches, target_modules=["embed_tokens"], progress=False, n_components=2, **rule
        )
        assert spectra["model.embed_tokens"].stopped == reason


def test_saved_spectra_of_other_layers_are_read_again(build, batches_for, tmp_path):
    spectra = measure(build("llama"), batches_for("llama"), target_modules=["embed_tokens"], **QUIET)
    again = type(spectra).load(spectra.save(tmp_path / "spectra"))
    assert torch.equal(again["model.embed_tokens"].components, spectra["model.embed_tokens"].components)
    assert again.plan(rank=3).ranks == {"model.embed_tokens": 3}


# -- attention --------------------------------------------------------------------------------------------------------

E = 16


class Attending(nn.Module):
    def __init__(self, *, cross=False, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(E, 4, **settings)
        self.cross = cross

    def forward(self, x, key_padding_mask=None):
        key = x.flip(-1) * 2 if self.cross else x
        value = x.roll(1, -1) * 3 if self.cross else x
        return self.attn(x, key, value, key_padding_mask=key_padding_mask, need_weights=False)[0]


def heads_output(attention, query, key, value, mask=None):
    """What enters the output projection, from the definition of attention, (B, T, E)."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (
        (x @ w.T + b).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :], float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def sequences(n_batches=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 7, E, generator=generator) * torch.linspace(0.3, 3, E) for _ in range(n_batches)]


def check_attention(spectrum, entered, given):
    """Compare the two parts of a spectrum with what entered both projections, each (n, E)."""
    parts = [rows - rows.mean(dim=0) for rows in (entered.double(), given.double())]
    values = [torch.linalg.svdvals(part) for part in parts]
    k = len(spectrum.singular_values)
    torch.testing.assert_close(
        spectrum.singular_values.double().square(), sum(s[:k].square() for s in values), rtol=1e-3, atol=1e-3
    )
    assert spectrum.n_rows == sum(map(len, parts))
    assert spectrum.total_variance == pytest.approx(
        float(sum(part.square().sum() for part in parts)) / (spectrum.n_rows - 1), rel=0.02
    )
    torch.testing.assert_close(spectrum.components @ spectrum.components.T, torch.eye(k), rtol=0, atol=1e-4)
    for part, piece in zip(parts, (spectrum.components.double() * 2**0.5).split(E, dim=1), strict=True):
        right = torch.linalg.svd(part, full_matrices=False).Vh
        assert (piece[0] @ right[0]).abs() > 0.999
        assert (piece @ right[:k].T).square().sum() > 0.97 * k


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cross", [False, True])
def test_both_projections_of_an_attention_module(batch_first, cross):
    model, batches = Attending(cross=cross, batch_first=batch_first).eval(), sequences()
    spectra = measure(model, batches, target_modules=["attn"], **QUIET)
    entered, given = [], []
    for x in batches:
        three = (x, x.flip(-1) * 2, x.roll(1, -1) * 3) if cross else (x, x, x)
        entered += list(three) if cross else [x]
        in_order = [tensor if batch_first else tensor.transpose(0, 1) for tensor in three]
        given.append(heads_output(model.attn, *in_order).detach())
    check_attention(spectra["attn"], *(torch.cat([x.reshape(-1, E) for x in rows]) for rows in (entered, given)))
    target = spectra.targets["attn"]
    assert (target.in_features, target.out_features) == (2 * E, 4 * E)


def test_padded_keys_of_self_attention_do_not_count():
    model, (x,) = Attending(batch_first=True).eval(), sequences(1)
    padded = torch.arange(7) >= torch.tensor([[7], [4], [3], [7], [5]])
    spectra = measure(
        model,
        [x],
        target_modules=["attn"],
        forward=lambda model, batch: model(batch, key_padding_mask=padded),
        **QUIET,
    )
    given = heads_output(model.attn, x, x, x, padded).detach()
    check_attention(spectra["attn"], x[~padded], given[~padded])


def test_masks_of_a_batch_fit_sequences_first_too():
    (x,) = sequences(1)
    x = x[:, :5]  # as many positions as sequences, so that the mask also fits the wrong way round
    counted = torch.arange(5) < torch.tensor([[5], [4], [3], [5], [2]])
    model = Attending().eval()
    model.forward = lambda x, attention_mask: model.attn(*[x.transpose(0, 1)] * 3, need_weights=False)
    batch = {"x": x, "attention_mask": counted}
    spectra = measure(model, [batch], target_modules=["attn"], **QUIET)
    check_attention(spectra["attn"], x[counted], heads_output(model.attn, x, x, x)[counted].detach())


def test_attention_is_computed_again_under_the_models_own_autocast():
    model = nn.Sequential(nn.Linear(E, E), Attending(batch_first=True)).eval()
    spectra = measure(model, sequences(), target_modules=["1.attn"], dtype=torch.bfloat16, **QUIET)
    exact = measure(model, sequences(), target_modules=["1.attn"], **QUIET)
    torch.testing.assert_close(spectra["1.attn"].singular_values, exact["1.attn"].singular_values, rtol=0.02, atol=0.02)


def test_an_encoder_of_torch_is_measured_without_its_fast_path():
    layer = nn.TransformerEncoderLayer(E, 4, 24, batch_first=True, dropout=0.0)
    model, batches = nn.TransformerEncoder(layer, 2).eval(), sequences()
    padded = torch.arange(7) >= torch.tensor([[7], [4], [3], [7], [5]])
    settings = {"forward": lambda model, batch: model(batch, src_key_padding_mask=padded), **QUIET}
    spectra = measure(model, batches, target_modules=["self_attn", "linear1", "linear2"], **settings)
    assert list(spectra) == [f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn", "linear1", "linear2")]
    entered = torch.cat([x[~padded] for x in batches])
    first = model.layers[0].self_attn
    given = torch.cat([heads_output(first, x, x, x, padded)[~padded] for x in batches]).detach()
    check_attention(spectra["layers.0.self_attn"], entered, given)
    assert torch.backends.mha.get_fastpath_enabled()


def test_all_linear_leaves_the_output_projection_to_its_attention_module():
    model = nn.TransformerEncoderLayer(E, 4, 24, batch_first=True).eval()
    assert list(measure(model, sequences(), **QUIET)) == ["self_attn", "linear1", "linear2"]
    with pytest.raises(EvaError, match=r"'self_attn\.out_proj' is never called: .* target 'self_attn' instead"):
        measure(model, sequences(), target_modules=["out_proj"], **QUIET)
    assert list(measure(model, sequences(), target_modules=["self_attn", "out_proj"], **QUIET)) == ["self_attn"]


def test_an_attention_module_without_packed_projection_is_refused():
    model = Attending(kdim=8).eval()
    with pytest.raises(EvaError, match=r"target 'attn' is an nn\.MultiheadAttention whose kdim=8 .* exclude_modules"):
        measure(model, sequences(), target_modules=["attn"], **QUIET)
