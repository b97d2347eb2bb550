"""Mixtures of experts: fused parameters and single linear layers, experts with few rows and with none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from evatune import EvaError, EvaWarning, Spectra, measure
from evatune.activations.layer_type import EXPERT

D, INNER, EXPERTS = 16, 12, 4
COMMON = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=EXPERTS)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, num_experts=EXPERTS, moe_intermediate_size=INNER, head_dim=8)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**COMMON, num_local_experts=EXPERTS, head_dim=8)),
}
QUIET = {"progress": False, "tau": None, "min_gain": None, "n_components": 4}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(params=sorted(MODELS))
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter)) if parameter.ndim > 1 else None
    return model.eval()


def routed(model, batches, *, layer, unrouted=()):
    """What enters both products of every expert, from the definition of the layer."""
    block = model.model.layers[layer].mlp
    experts = block.experts
    kept = []
    handle = experts.register_forward_pre_hook(
        lambda m, args, kwargs: kept.append((*args, *kwargs.values())), with_kwargs=True
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    transposed = getattr(experts, "is_transposed", False)
    first, second = {e: [] for e in range(EXPERTS)}, {e: [] for e in range(EXPERTS)}
    for (hidden, index, *_), batch in zip(kept, batches, strict=True):
        hidden, index = hidden.reshape(-1, D), index.reshape(hidden.numel() // D, -1)
        counted = batch["attention_mask"].reshape(-1).bool()
        for e in range(EXPERTS):
            rows = hidden[counted & (index == e).any(dim=1)]
            weight = experts.gate_up_proj[e] if transposed else experts.gate_up_proj[e].T
            gate_up = rows @ weight
            if hasattr(experts, "gate_up_proj_bias"):
                gate_up = gate_up + experts.gate_up_proj_bias[e]
            first[e].append(rows)
            second[e].append(experts._apply_gate(gate_up).detach())
    return [{e: torch.cat(rows).double() for e, rows in stage.items()} for stage in (first, second)]


def check_experts(spectrum, rows, width):
    k = len(spectrum.singular_values)
    pieces = (spectrum.components.double() * EXPERTS**0.5).split(width, dim=1)
    squares = torch.zeros(k, dtype=torch.float64)
    for e, piece in enumerate(pieces):
        centred = rows[e] - rows[e].mean(dim=0)
        values, right = torch.linalg.svd(centred, full_matrices=False)[1:]
        squares += values[:k].square()
        assert (piece[0] @ right[0]).abs() > 0.999, e
        assert (centred @ piece.T).square().sum() > 0.999 * values[:k].square().sum(), e
    torch.testing.assert_close(spectrum.singular_values.double().square(), squares, rtol=1e-3, atol=1e-4)
    assert spectrum.n_rows == sum(map(len, rows.values()))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_fused_experts_are_measured_expert_by_expert(model, batches_for, implementation):
    batches = batches_for("llama", 6, size=8, length=20)
    model.config._experts_implementation = implementation
    spectra = measure(model, batches, target_modules=[], target_parameters=PARAMETERS, **QUIET)
    assert model.config._experts_implementation == implementation
    first, second = routed(model, batches, layer=1)
    prefix = "model.layers.1.mlp.experts."
    check_experts(spectra[prefix + "gate_up_proj"], first, D)
    check_experts(spectra[prefix + "down_proj"], second, INNER)
    shapes = {name: (target.in_features, target.out_features) for name, target in spectra.targets.items()}
    assert shapes[prefix + "gate_up_proj"] == (EXPERTS * D, EXPERTS * 2 * INNER)
    assert shapes[prefix + "down_proj"] == (EXPERTS * INNER, EXPERTS * D)


def test_experts_under_autocast(model, batches_for):
    spectra = measure(
        model,
        batches_for("llama", 2),
        target_modules=["q_proj"],
        target_parameters=PARAMETERS,
        dtype=torch.bfloat16,
        **QUIET,
    )
    assert len(spectra) == 6 and all(torch.isfinite(spectrum.components).all() for spectrum in spectra.inputs.values())


def test_experts_with_too_few_rows_take_their_directions_from_all(batches_for):
    torch.manual_seed(0)
    model = MODELS["mixtral"]().eval()
    model.model.layers[0].mlp.gate.weight.data[2] = -100 * torch.ones(D)  # nobody goes there
    model.model.layers[0].input_layernorm.weight.data.abs_()
    model.get_input_embeddings().weight.data.abs_()
    batches = batches_for("llama", 4)
    spectra = measure(model, batches, target_modules=[], target_parameters=PARAMETERS, **QUIET)
    first, _ = routed(model, batches, layer=0)
    assert len(first[2]) == 0
    prefix = "model.layers.0.mlp.experts."
    everyone = torch.cat(list(first.values()))
    leading = torch.linalg.svd(everyone - everyone.mean(dim=0), full_matrices=False).Vh[:4]
    piece = spectra[prefix + "gate_up_proj"].components.double()[:, 2 * D : 3 * D] * EXPERTS**0.5
    assert (piece @ leading.T).square().sum() > 3.99
    own = spectra[prefix + "down_proj"].components.double()[:, 2 * INNER : 3 * INNER] * EXPERTS**0.5
    torch.testing.assert_close(own @ own.T, torch.eye(4).double(), rtol=0, atol=1e-5)


def test_parameters_that_match_nothing_or_are_no_experts():
    model = MODELS["mixtral"]()
    with pytest.raises(EvaError, match=r"target_parameters='experts.down_prj' \(did you mean .*experts.down_proj"):
        measure(model, [], target_modules=[], target_parameters=["experts.down_prj"], **QUIET)
    with pytest.raises(EvaError, match=r"q_proj.weight' of shape \(16, 16\) does not hold the weights of several"):
        measure(model, [], target_modules=[], target_parameters=["q_proj.weight"], **QUIET)


class Looped(nn.Module):
    """Experts of plain torch behind a linear layer; every position goes through all."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(D, D)
        self.experts = nn.Module()
        self.experts.weights = nn.Parameter(torch.randn(EXPERTS, D, D))
        self.experts.forward = lambda x: sum(nn.functional.linear(x, w) for w in self.experts.weights)

    def forward(self, x):
        return self.experts(self.before(x))


def test_experts_are_computed_again_under_the_models_own_autocast():
    torch.manual_seed(0)
    model, x = Looped(), torch.randn(50, D)
    spectra = measure(
        model, [x], target_modules=[], target_parameters=["experts.weights"], dtype=torch.bfloat16, **QUIET
    )
    rows = model.before(x).detach()
    values = torch.linalg.svdvals(rows - rows.mean(dim=0))[:4]
    torch.testing.assert_close(spectra["experts.weights"].singular_values, values * EXPERTS**0.5, rtol=0.02, atol=0.02)


class Odd(nn.Module):
    """Experts that are multiplied as one einsum."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.weights = nn.Parameter(torch.randn(EXPERTS, D, D))
        self.experts.forward = lambda x: torch.einsum("nd,eod->no", x, self.experts.weights)

    def forward(self, x):
        return self.experts(x)


def test_experts_that_cannot_be_followed_say_so():
    with pytest.raises(EvaError, match=r"target 'experts.weights' is multiplied in a way .* target_parameters"):
        measure(Odd(), [torch.randn(5, D)], target_modules=[], target_parameters=["experts.weights"], **QUIET)


# -- experts that are linear layers -----------------------------------------------------------------------------------


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(D, INNER), nn.Linear(D, INNER), nn.Linear(INNER, D)

    def forward(self, x):
        return self.down(self.up(x) * torch.sigmoid(self.gate(x)))


class Mixture(nn.Module):
    """A block that sends a row to the expert that its last feature names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.head = nn.Linear(D, 2)

    def forward(self, input_values, attention_mask=None):
        rows = input_values.reshape(-1, D)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            chosen = rows[:, -1].long() == number
            if chosen.any():
                out[chosen] = expert(rows[chosen])
        return self.head(rows + out)


def destined(*shares, n=40, seed=0):
    """Rows for the experts in these numbers."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, D, generator=generator) * torch.linspace(0.2, 2, D)
    rows[:, -1] = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(shares)).float()
    return {"input_values": rows[torch.randperm(n, generator=generator)]}


def test_every_expert_is_measured_on_its_own_rows():
    batches = [destined(10, 10, 10, 10, seed=seed) for seed in range(4)] + [destined(40, 0, 0, 0, seed=9)]
    spectra = measure(Mixture(), batches, **QUIET)
    for number in range(EXPERTS):
        rows = torch.cat([b["input_values"][b["input_values"][:, -1] == number] for b in batches])
        up, down = (spectra[f"experts.{number}.{part}"] for part in ("up", "down"))
        assert up.n_rows == down.n_rows == len(rows)
        variances = torch.linalg.svdvals(rows - rows.mean(dim=0)).square() / (len(rows) - 1)
        torch.testing.assert_close(up.explained_variance, variances[:4], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_rows", [0, 3])
def test_experts_with_few_or_no_rows_take_what_their_siblings_saw(n_rows):
    batches = [destined(14, 13, 13, 0, seed=1)] * 3 + [destined(20, 20 - n_rows, 0, n_rows, seed=2)]
    # An expert's layers that were called together share an input, also where that was in the last batch only.
    with pytest.warns(
        EvaWarning, match=rf"{2 if n_rows else 3} of \d+ inputs are of experts that got fewer than 4 rows"
    ):
        spectra = measure(Mixture(), batches, **QUIET)
    rows = torch.cat([b["input_values"] for b in batches])
    values, right = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)[1:]
    for part in ("up", "gate"):
        poor = spectra[f"experts.3.{part}"]
        assert (poor.stopped, poor.backend, poor.n_rows) == ("too few rows", "pooled experts", len(rows))
        torch.testing.assert_close(poor.singular_values, values[:4], rtol=1e-3, atol=1e-3)
        assert (poor.components @ right[:4].T).square().sum() > 3.99
    poor = spectra["experts.3.down"]
    assert (poor.stopped, poor.backend, poor.n_rows) == ("too few rows", "mean of experts", n_rows)
    siblings = [spectra[f"experts.{number}.down"] for number in range(3)]
    mean = torch.stack([s.explained_variance for s in siblings]).mean(dim=0)
    torch.testing.assert_close(poor.explained_variance, mean)
    assert poor.total_variance == pytest.approx(sum(s.total_variance for s in siblings) / 3)
    torch.testing.assert_close(poor.components @ poor.components.T, torch.eye(4), rtol=0, atol=1e-5)
    plan = spectra.plan(rank=2)
    assert plan.ranks["experts.3.down"] > 0 and list(spectra) == list(plan.ranks) and len(spectra) == 3 * EXPERTS + 1


def test_spectra_in_which_one_pca_stands_in_for_several_experts_can_be_saved(tmp_path):
    with pytest.warns(EvaWarning, match=r"inputs are of experts that got fewer than 4 rows"):
        spectra = measure(Mixture(), [destined(40, 0, 0, 0)], **QUIET)
    loaded = Spectra.load(spectra.save(tmp_path / "spectra"))
    assert torch.equal(loaded["experts.1.up"].components, loaded["experts.2.up"].components)


def test_padding_that_is_routed_to_experts_does_not_count():
    x, mask = destined(10, 10, 10, 10)["input_values"].view(4, 10, D), torch.ones(4, 10).tril(5)
    spectra = measure(Mixture(), [{"input_values": x, "attention_mask": mask}] * 2, **QUIET)
    kept = x[mask.bool()]
    for number in range(EXPERTS):
        routed = kept[kept[:, -1].long() == number]
        assert spectra[f"experts.{number}.up"].n_rows == 2 * len(routed)
        torch.testing.assert_close(spectra[f"experts.{number}.up"].mean, routed.mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mlp.experts.3.down_proj", ("mlp.experts", "3", "down_proj")),
        ("mlp.experts.expert_3.wo", ("mlp.experts.expert_", "3", "wo")),
        ("experts.3", ("experts", "3", None)),
        ("mlp.shared_expert.gate_proj", None),
        ("layers.3.mlp.down_proj", None),
    ],
)
def test_experts_are_known_by_their_names(name, parts):
    match = EXPERT.fullmatch(name)
    assert (match and match.group("group", "number", "part")) == parts
