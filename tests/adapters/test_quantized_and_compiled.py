"""Quantized, compiled, checkpointed and offloaded models are measured and initialized like any other."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn

import evatune
from evatune import EvaError
from evatune.adapters.lora import find_adapter

pytestmark = pytest.mark.on_hardware("torch does not compile for it, and libraries of quantization do not know it")

QUIET = {"progress": False, "tau": None, "min_gain": None}


def spectra_of(model, batches, **settings):
    return evatune.measure(model, batches, n_components=4, **QUIET | settings)


def check_same(left, right, *, exact=True):
    assert list(left) == list(right)
    for name in left:
        if exact:
            assert torch.equal(left[name].components, right[name].components), name
        torch.testing.assert_close(left[name].singular_values, right[name].singular_values, rtol=1e-4, atol=1e-4)


# -- quantized --------------------------------------------------------------------------------------------------------


def quantize_with_bitsandbytes(model, bits):
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            if bits == 4:
                new = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
            else:
                new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
            new.load_state_dict(module.state_dict())
            if bits == 4:  # its repacking for processors needs rows of 64 numbers
                new.support_avx512bf16_for_cpu = False
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to("cpu"))
    if bits == 8:
        model.is_loaded_in_8bit = True
    else:
        model.is_loaded_in_4bit = True
    return model.eval()


def quantize_with_torchao(model):
    from torchao import quantization

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))
    return model


QUANTIZED = {
    "bitsandbytes 4 bit": lambda model: quantize_with_bitsandbytes(model, 4),
    "bitsandbytes 8 bit": lambda model: quantize_with_bitsandbytes(model, 8),
    "torchao int8": quantize_with_torchao,
}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_models(llama, lora, batches, outputs, tmp_path, kind):
    quantize = QUANTIZED[kind]
    base = outputs(quantize(llama()), batches[0])
    assert (base - outputs(llama(), batches[0])).abs().max() > 1e-4
    model = lora(quantize(llama()))
    plan = evatune.initialize(model, batches, rho=2.0, **QUIET)
    assert len(plan.ranks) == 14 and plan.total == plan.budget
    torch.testing.assert_close(outputs(model, batches[0]), base, rtol=1e-4, atol=1e-4)
    # What enters the layers is what the quantized model computes.
    seen = []
    plain = quantize(llama())
    down = plain.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1).double()))
    for batch in batches:
        outputs(plain, batch)
    rows = torch.cat(seen)
    leading = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False).Vh[0]
    name = "model.layers.1.mlp.down_proj"
    if plan.ranks[name]:
        first = find_adapter(model, "default")[2][name].lora_A["default"].weight[0]
        assert (first.double() @ leading).abs() > 0.999
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantize(llama()), tmp_path).eval()
    torch.testing.assert_close(outputs(again, batches[0]), base, rtol=1e-4, atol=1e-4)


def test_measuring_leaves_weights_in_four_bits_as_they_are_packed(vectors):
    """On processors, bitsandbytes repacks them in evaluation mode, and then no gradient passes them any more."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    model = nn.Sequential(nn.Linear(16, 64), layer.to("cpu"))
    before = model[1].weight.data.clone(), model[1].support_avx512bf16_for_cpu
    spectra_of(model, vectors, target_modules=["0", "1"])
    assert torch.equal(model[1].weight.data, before[0]) and model[1].support_avx512bf16_for_cpu == before[1]
    x = torch.randn(2, 16, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.any()


def test_quantized_layers_of_other_libraries_are_known_by_their_names(vectors):
    class WQLinear_GEMM(nn.Module):  # noqa: N801 - as AutoAWQ calls it
        """A linear layer whose weight is no parameter."""

        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 16, 8
            self.register_buffer("qweight", torch.randint(-8, 8, (16, 8)))

        def forward(self, x):
            return x @ (self.qweight / 8)

    spectra = spectra_of(nn.Sequential(WQLinear_GEMM()), vectors)
    check_same(spectra, spectra_of(nn.Sequential(nn.Linear(16, 8)), vectors))


# -- compiled ---------------------------------------------------------------------------------------------------------


def compile_whole(model):
    return torch.compile(model, backend="eager")


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_layers(model):
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place, compile_layers])
@pytest.mark.parametrize("passes_before", [0, 1])
def test_compiled_models(llama, batches, outputs, compiled, passes_before):
    expected = spectra_of(llama(), batches)
    model = compiled(llama())
    before = [outputs(model, batches[0]) for _ in range(passes_before)]
    check_same(spectra_of(model, batches), expected)
    after = outputs(model, batches[0])
    assert all(torch.equal(output, after) for output in before)


@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place])
def test_a_compiled_adapter_is_initialized_after_a_pass(llama, lora, batches, outputs, compiled):
    base = outputs(llama(), batches[0])
    plan = evatune.initialize(lora(llama()), batches, **QUIET)
    model = compiled(lora(llama()))
    outputs(model, batches[0])
    assert evatune.initialize(model, batches, **QUIET).ranks == plan.ranks
    torch.testing.assert_close(outputs(model, batches[0]), base, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing(llama, lora, batches, outputs):
    expected = evatune.initialize(lora(llama()), batches, **QUIET)
    for reentrant in (True, False):
        model = lora(llama())
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        assert evatune.initialize(model, batches, **QUIET).ranks == expected.ranks
        assert model.is_gradient_checkpointing and model.training
        model(**batches[0]).loss.backward()
        assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_checkpointing_that_does_not_ask_for_training_mode(vectors):
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return checkpoint(self.b, torch.tanh(self.a(x)), use_reentrant=False)

    spectra = spectra_of(Net(), vectors)
    rows = torch.tanh(Net().a(torch.cat(vectors))).detach()
    variances = torch.linalg.svdvals(rows - rows.mean(dim=0)).square() / (len(rows) - 1)
    torch.testing.assert_close(spectra["b"].explained_variance, variances[:4], rtol=1e-3, atol=1e-5)


# -- offloaded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device_map",
    [
        {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.norm": "cpu",
            "lm_head": "cpu",
        },
        {"": "disk"},
    ],
    ids=["the last layer on disk", "all on disk"],
)
def test_parts_on_other_devices(llama, lora, batches, outputs, tmp_path, device_map):
    from accelerate import dispatch_model

    def offloaded():
        folder = str(tmp_path / "offload")
        model = llama()
        model.config.tie_word_embeddings = False
        if device_map == {"": "disk"}:
            from accelerate import disk_offload

            return disk_offload(model, folder, execution_device=torch.device("cpu"))
        return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)

    expected = spectra_of(llama(), batches)
    model = offloaded()
    assert any(parameter.is_meta for parameter in model.parameters())
    check_same(spectra_of(model, batches), expected)
    check_same(spectra_of(model, batches, dtype=torch.bfloat16), spectra_of(llama(), batches, dtype=torch.bfloat16))

    base = outputs(llama(), batches[0])
    adapted = lora(offloaded())
    plan = evatune.initialize(adapted, batches, **QUIET)
    assert plan.ranks == evatune.initialize(lora(llama()), batches, **QUIET).ranks
    layers = find_adapter(adapted, "default")[2].values()
    assert not any(parameter.is_meta for layer in layers for parameter in layer.lora_A.parameters())
    torch.testing.assert_close(outputs(adapted, batches[0]), base, rtol=1e-5, atol=1e-5)


def test_dora_of_offloaded_weights_is_refused(lora, vectors, tmp_path):
    from accelerate import disk_offload

    model = lora(disk_offload(nn.Sequential(nn.Linear(16, 4)), str(tmp_path)), target_modules=["0"], use_dora=True)
    with pytest.raises(EvaError, match="DoRA needs the norms of the weight of '0', which is offloaded"):
        evatune.initialize(model, vectors, **QUIET)
