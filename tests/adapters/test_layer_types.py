"""Adapters on every layer type: from measuring to a saved adapter that is read again."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import evatune
from evatune import EvaError, EvaWarning
from evatune.adapters import require_initialized
from evatune.adapters.factors import factors_of
from evatune.adapters.lora import find_adapter

E = 16


class Encoder(nn.Module):
    """Tokens, a convolution over time, attention and a linear layer."""

    def __init__(self, *, n_dims=1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n_dims - 1]
        self.n_dims = n_dims
        self.tokens = nn.Embedding(40, 8)
        self.conv = convolution(8, E, 3, padding=1)
        self.attn = nn.MultiheadAttention(E, 4, batch_first=True)
        self.fc = nn.Linear(E, E)

    def forward(self, input_ids):
        x = self.tokens(input_ids).transpose(1, 2)
        x = self.conv(x.unflatten(2, (-1, *[2] * (self.n_dims - 1)))).flatten(2).transpose(1, 2)
        return x + self.fc(x + self.attn(x, x, x, need_weights=False)[0])


@pytest.fixture
def token_batches():
    generator = torch.Generator().manual_seed(1)
    frequent = 1 / torch.arange(1, 41)
    return [{"input_ids": torch.multinomial(frequent, 96, True, generator=generator).view(4, 24)} for _ in range(3)]


@pytest.fixture
def run():
    def outputs(model, batches):
        with torch.no_grad():
            return torch.stack([model(**batch) for batch in batches])

    return outputs


TARGETS = ["tokens", "conv", "attn", "fc"]


def train_a_little(model):
    """Move B, so that every adapter changes the outputs."""
    generator = torch.Generator().manual_seed(5)
    for layer in find_adapter(model, "default")[2].values():
        for pair in factors_of(layer, "default"):
            pair.up_weight.data += 0.1 * torch.randn(pair.up_weight.shape, generator=generator)


def check_read_again(model, again, run, batches):
    tensors, read = (get_peft_model_state_dict(m) for m in (model, again))
    assert list(tensors) == list(read) and all(torch.equal(read[name], tensors[name]) for name in tensors)
    # PEFT adds the adapter of attention modules to the weights and takes it off again in every forward pass.
    torch.testing.assert_close(run(again, batches), run(model, batches), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_dims", [1, 2, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"target_modules": ["conv", "tokens"], "use_dora": True}]
)
def test_outputs_are_the_base_models_and_a_saved_adapter_is_read_again(
    lora, run, token_batches, tmp_path, n_dims, settings
):
    base = run(Encoder(n_dims=n_dims).eval(), token_batches)
    model = lora(Encoder(n_dims=n_dims), **{"target_modules": TARGETS} | settings)
    plan = evatune.initialize(model, token_batches, rho=2.0, progress=False)
    assert plan.total == plan.budget and any(rank != 4 for rank in plan.ranks.values())
    torch.testing.assert_close(run(model, token_batches), base, rtol=1e-5, atol=1e-6)

    train_a_little(model)
    assert (run(model, token_batches) - base).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Encoder(n_dims=n_dims), tmp_path).eval()
    check_read_again(model, again, run, token_batches)
    torch.testing.assert_close(run(again.unload(), token_batches), base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_a_is_made_of_the_components_of_its_input(lora, token_batches, name):
    spectra = evatune.measure(Encoder(), token_batches, target_modules=TARGETS, n_components=8, progress=False)
    model = lora(Encoder(), target_modules=TARGETS)
    plan = evatune.initialize(model, spectra)
    pairs = factors_of(find_adapter(model, "default")[2][name], "default")
    rows = torch.cat([pair.down_weight.flatten(1) for pair in pairs], dim=1)
    torch.testing.assert_close(rows, spectra[name].components[: plan.ranks[name]] * len(pairs) ** 0.5)
    assert all(not pair.up_weight.any() for pair in pairs)


def test_a_convolution_and_its_a_see_the_same_patches(lora, token_batches):
    """With all components, the outputs of A have the variances of the spectrum."""
    spectra = evatune.measure(Encoder(), token_batches, target_modules=["conv"], n_components=4, progress=False)
    model = lora(Encoder(), target_modules=["conv"])
    evatune.initialize(model, spectra, rho=1.0)
    given = []
    model.base_model.model.conv.lora_A["default"].register_forward_hook(lambda m, a, out: given.append(out))
    for batch in token_batches[: spectra["conv"].n_batches]:
        model(**batch)
    outputs = torch.cat([out.transpose(1, 2).flatten(0, 1) for out in given])
    torch.testing.assert_close(outputs.var(dim=0), spectra["conv"].explained_variance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gone", TARGETS)
def test_a_layer_with_rank_zero_loses_its_adapter(lora, run, token_batches, tmp_path, gone):
    spectra = evatune.measure(Encoder(), token_batches, target_modules=TARGETS, n_components=8, progress=False)
    key = spectra.targets[gone].input
    still = dataclasses.replace(spectra.inputs[key], singular_values=torch.zeros(8))
    spectra = dataclasses.replace(spectra, inputs=spectra.inputs | {key: still})
    model = lora(Encoder(), target_modules=TARGETS)
    plan = evatune.initialize(model, spectra)
    assert plan.ranks[gone] == 0
    assert list(find_adapter(model, "default")[2]) == [name for name in TARGETS if name != gone]
    assert not any(f"{gone}.lora" in name or f"{gone}.base_layer" in name for name, _ in model.named_parameters())
    train_a_little(model)
    model.save_pretrained(tmp_path)
    check_read_again(model, PeftModel.from_pretrained(Encoder(), tmp_path).eval(), run, token_batches)


def test_rank_zero_on_an_attention_module_leaves_its_other_adapter(lora, run, token_batches):
    spectra = evatune.measure(Encoder(), token_batches, target_modules=["attn", "fc"], n_components=8, progress=False)
    still = dataclasses.replace(spectra.inputs["attn"], singular_values=torch.zeros(8))
    model = lora(Encoder(), target_modules=["attn", "fc"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["attn"]))
    model.base_model.model.attn.lora_B["other"].weight.data += 1.0
    model.set_adapter("other")
    before = run(model, token_batches)
    model.set_adapter("default")
    evatune.initialize(model, dataclasses.replace(spectra, inputs=spectra.inputs | {"attn": still}))
    model.set_adapter("other")
    torch.testing.assert_close(run(model, token_batches), before)


def test_forgotten_initialization_is_seen_on_every_layer_type(lora, token_batches, tmp_path):
    model = lora(Encoder(), target_modules=TARGETS)
    with pytest.raises(EvaError, match="never initialized"):
        require_initialized(model, asked=True)
    evatune.initialize(model, token_batches, progress=False)
    require_initialized(model, asked=True)
    model.save_pretrained(tmp_path)
    require_initialized(PeftModel.from_pretrained(Encoder(), tmp_path), asked=True)


def test_dilated_convolutions_are_refused(lora):
    model = lora(nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2)), target_modules=["0"])
    with pytest.raises(EvaError, match=r"'0' is a convolution with dilation=\(2,\), which PEFT's adapter does not"):
        evatune.initialize(model, [torch.randn(2, 4, 8)])


def test_an_output_projection_by_itself_has_no_effect_and_a_warning_says_so(lora, run, token_batches):
    """PEFT's "all-linear" means such projections."""
    model = lora(Encoder(), target_modules="all-linear")
    with pytest.warns(EvaWarning, match=r"adapter on 'attn\.out_proj' has no effect .* name 'attn' in target_modules"):
        plan = evatune.initialize(model, token_batches, progress=False)
    assert list(plan.ranks) == ["fc"]
    torch.testing.assert_close(run(model, token_batches), run(Encoder().eval(), token_batches))


def test_tied_adapters_are_refused(lora, token_batches):
    model = lora(Encoder(), target_modules=["tokens"])
    model.peft_config["default"].ensure_weight_tying = True
    with pytest.raises(EvaError, match="ensure_weight_tying=True"):
        evatune.initialize(model, token_batches)


# -- fused experts ----------------------------------------------------------------------------------------------------


def mixture(*, transposed=False, seed=0):
    """A tiny mixture-of-experts model: Mixtral, or gpt-oss, which stores its experts transposed and with biases."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": 40,
        "hidden_size": E,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    kind = (
        GptOssForCausalLM(GptOssConfig(**common, head_dim=8))
        if transposed
        else MixtralForCausalLM(MixtralConfig(**common))
    )
    with torch.no_grad():
        for parameter in kind.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return kind.eval()


PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture
def run_causal():
    def outputs(model, batches):
        with torch.no_grad():
            return torch.stack([model(**batch).logits for batch in batches])

    return outputs


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("modules", [[], ["q_proj", "o_proj"]])
def test_fused_experts(lora, run_causal, token_batches, tmp_path, transposed, modules):
    base = run_causal(mixture(transposed=transposed), token_batches)
    model = lora(mixture(transposed=transposed), target_modules=modules, target_parameters=PARAMETERS)
    plan = evatune.initialize(model, token_batches, rho=2.0, progress=False)
    assert plan.total == plan.budget == 4 * (4 + 2 * len(modules))
    torch.testing.assert_close(run_causal(model, token_batches), base, rtol=1e-5, atol=1e-5)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert plan.n_parameters == trainable

    train_a_little(model)
    assert (run_causal(model, token_batches) - base).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixture(transposed=transposed), tmp_path).eval()
    check_read_again(model, again, run_causal, token_batches)


@pytest.mark.parametrize("transposed", [False, True])
def test_every_expert_starts_from_its_own_components(lora, token_batches, transposed):
    model = lora(mixture(transposed=transposed), target_modules=[], target_parameters=PARAMETERS)
    options = {"target_modules": [], "target_parameters": PARAMETERS, "n_components": 8, "progress": False}
    spectra = evatune.measure(model, token_batches, **options)
    plan = evatune.initialize(model, spectra)
    for name, layer in find_adapter(model, "default")[2].items():
        pieces = spectra[name].components[: plan.ranks[name]].chunk(4, dim=1)
        (pair,) = factors_of(layer, "default")
        for block, piece in zip(pair.blocks(), pieces, strict=True):
            torch.testing.assert_close(block, 2 * piece)
        # What PEFT adds to expert 3 is made of the rows of A of expert 3 alone.
        pair.up_weight.data.view(pair.up_weight.shape[0], -1, 4)[:, :, 3] = 1.0
        delta = layer.get_delta_weight("default")
        assert not delta[:3].any() and delta[3].any()
        inputs = delta[3].T if transposed else delta[3]
        residual = inputs - inputs @ torch.linalg.pinv(pair.blocks()[3]) @ pair.blocks()[3]
        assert residual.abs().max() < 1e-5
    require_initialized(model, asked=True)


@pytest.mark.parametrize("gone", PARAMETERS)
def test_fused_experts_with_rank_zero_lose_their_adapter(lora, run_causal, token_batches, tmp_path, gone):
    model = lora(mixture(), target_modules=["q_proj"], target_parameters=PARAMETERS)
    options = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS, "n_components": 8, "progress": False}
    spectra = evatune.measure(model, token_batches, **options)
    name = f"model.layers.1.mlp.{gone}"
    still = dataclasses.replace(spectra.inputs[name], singular_values=torch.zeros(8))
    plan = evatune.initialize(model, dataclasses.replace(spectra, inputs=spectra.inputs | {name: still}))
    assert plan.ranks[name] == 0 and name not in find_adapter(model, "default")[2]
    train_a_little(model)
    model.save_pretrained(tmp_path)
    check_read_again(model, PeftModel.from_pretrained(mixture(), tmp_path).eval(), run_causal, token_batches)


def test_the_weight_of_a_layer_among_target_parameters_starts_as_the_layer_would(lora, token_batches):
    plans, matrices = [], []
    for settings in ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, {"target_modules": ["q_proj"]}):
        model = lora(mixture(), **settings)
        plans.append(evatune.initialize(model, token_batches))
        layers = find_adapter(model, "default")[2]
        matrices.append({name: factors_of(layer, "default")[0].down_weight for name, layer in layers.items()})
    assert plans[0] == plans[1]
    assert list(matrices[0]) == list(matrices[1]) == list(plans[0].ranks)
    for name, matrix in matrices[0].items():
        torch.testing.assert_close(matrix, matrices[1][name])


class Block(nn.Module):
    """Three experts, the last of which no row is sent to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(E, 12), nn.Tanh(), nn.Linear(12, E)) for _ in range(3))

    def forward(self, x):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = x[:, 0].sign() == 2 * number - 1
            if chosen.any():
                out[chosen] = expert(x[chosen])
        return x + out


def test_an_expert_without_rows_keeps_an_adapter(lora):
    batches = [torch.randn(40, E, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    model = lora(Block())
    with pytest.warns(EvaWarning, match="of experts that got fewer than 8 rows"):
        plan = evatune.initialize(model, batches, progress=False)
    assert plan.total == plan.budget and min(plan.ranks["experts.2.0"], plan.ranks["experts.2.2"]) > 0
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), Block()(batches[0]))
