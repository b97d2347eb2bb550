"""Tiny models of many families, and one check that each goes through: an independent oracle, and the way to PEFT.

The oracle passes every sample alone, without padding, and keeps what plain hooks see: a model that masks its padding
gives a sample the same activations in a padded batch. So the oracle knows nothing of masks. Where a model pads by
itself, its family says which positions of a tensor count.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import evatune
from evatune.adapters import unload

VOCABULARY = 99
N_COMPONENTS = 4
RTOL = 1e-3

SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "decoder_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "hidden_dim", "mlp_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dim_feedforward"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "state_size"), 4),
    **{"image_size": 16, "patch_size": 4, "num_labels": 3, "projection_dim": 16, "rotary_dim": 4},
}
"""What the sizes of a configuration become, under the names that configurations give them."""

HEADS = r"(.*\.)?(classifier|score|pre_classifier|projector|qa_outputs|lm_head|decode_head|router)(\..*)?|head(\..*)?"
"""What may be left out of "all-linear": heads, and routers that PEFT cannot wrap."""
NEVER_TARGETS = r"(.*\.)?(classifier|score|qa_outputs)"

TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")


def tiny_config(config_class: Any, **settings: Any) -> Any:
    """Return a configuration with small sizes, also inside; `settings` come on top, those of a part as a mapping."""
    default = config_class()
    values: dict[str, Any] = {}
    for name, size in SIZES.items():
        is_field = not isinstance(getattr(config_class, name, None), property)
        if is_field and isinstance(getattr(default, name, None), int):
            values[name] = size
    values |= {name: 0 for name in TOKENS if isinstance(getattr(default, name, None), int)}
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            given = settings.pop(name, {})
            values[name] = tiny_config(type(part), **given).to_dict() if isinstance(given, Mapping) else given
    return config_class(**(values | settings))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """Build a model by the name of its class in transformers."""

    def build(name: str, **settings: Any) -> nn.Module:
        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        model_class = getattr(transformers, name)
        return model_class(tiny_config(model_class.config_class, **settings)).eval()

    return build


Sample = dict[str, Any]
Valid = Callable[[str, Tensor, Sample], Tensor | None]


def collated(samples: list[Sample]) -> Sample:
    """Pad each entry to the longest in its second dimension with zeros, labels with -100, and join the samples."""
    batch: Sample = {}
    for name, first in samples[0].items():
        tensors = [sample[name] for sample in samples]
        if isinstance(first, Tensor) and first.ndim > 1:
            longest = max(tensor.shape[1] for tensor in tensors)
            filling = -100 if "labels" in name else 0
            tensors = [padded(tensor, longest, filling) for tensor in tensors]
        batch[name] = torch.cat(tensors) if isinstance(first, Tensor) else first
    return batch


def padded(tensor: Tensor, length: int, filling: int) -> Tensor:
    more = tensor.new_full((tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:]), filling)
    return torch.cat([tensor, more], dim=1)


@pytest.fixture(scope="session")
def images() -> Callable[..., list[Tensor]]:
    """Make images or videos, each a batch of one."""

    def make(*shape: int, n: int = 12, seed: int = 2) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(1, *shape, generator=generator) for _ in range(n)]

    return make


@pytest.fixture(scope="session")
def texts() -> Callable[..., list[Sample]]:
    """Make texts of different lengths without padding, each a batch of one."""

    def make(n: int = 12, *, lengths: tuple[int, int] = (4, 13), seed: int = 0, **more: Any) -> list[Sample]:
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for _ in range(n):
            length = int(torch.randint(*lengths, (1,), generator=generator))
            ids = torch.randint(3, 90, (1, length), generator=generator)
            samples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **more})
        return samples

    return make


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of routers, which hold one matrix and are no linear layers, by the name of the matrix."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if re.search("Router|Gate$", type(module).__name__) and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    }


def routed_rows(module: Any, hidden: Tensor, chosen: Tensor, *rest: Any) -> list[Tensor]:
    """Return the rows that are routed to each fused expert, from the arguments of the call."""
    return [hidden[(chosen == number).any(-1)] for number in range(len(module.gate_up_proj))]


def attention_rows(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    """Return what enters the packed projections of `nn.MultiheadAttention`, and what its heads give, without masks."""
    entered = [query] if query is key is value else [query, key, value]
    weights, biases = module.in_proj_weight.double().chunk(3), module.in_proj_bias.double().chunk(3)
    parts = zip((query, key, value), weights, biases, strict=True)
    q, k, v = (F.linear(x.double(), w, b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x, w, b in parts)
    heads = (q @ k.transpose(-1, -2) / module.head_dim**0.5).softmax(-1) @ v
    width = module.embed_dim
    return [torch.cat([x.reshape(-1, width) for x in entered]), heads.transpose(1, 2).reshape(-1, width)]


def seen_parts(
    model: nn.Module, samples: Iterable[Sample], *, forward: Callable[[nn.Module, Sample], Any]
) -> dict[str, list[Tensor]]:
    """Return the rows, in float64, of each part of the targets with several, while the samples pass one by one."""
    rows: dict[str, list[list[Tensor]]] = {}

    def keep(name: str, parts: Callable[..., list[Tensor]]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = [part.double() for part in parts(module, *args, *kwargs.values())]
            for kept, part in zip(rows.setdefault(name, [[] for _ in found]), found, strict=True):
                kept.append(part)

        return hook

    handles = []
    for name, module in model.named_modules():
        if "top_k_index" in inspect.signature(module.forward).parameters and hasattr(module, "gate_up_proj"):
            seen = keep(f"{name}.gate_up_proj", routed_rows)
            handles.append(module.register_forward_pre_hook(seen, with_kwargs=True))
        elif isinstance(module, nn.MultiheadAttention) and module.batch_first:
            handles.append(module.register_forward_pre_hook(keep(name, attention_rows), with_kwargs=True))
    with torch.no_grad():
        for sample in samples:
            forward(model, sample)
    for handle in handles:
        handle.remove()
    return {name: [torch.cat(kept) for kept in of_parts] for name, of_parts in rows.items()}


def wrong_parts(spectrum: evatune.Spectrum, rows: list[Tensor]) -> str:
    """Say in what the spectrum of a target with several parts differs from the exact ones of these, or nothing."""
    if spectrum.n_rows != sum(map(len, rows)):
        return f"{spectrum.n_rows} rows for {sum(map(len, rows))}"
    k = len(spectrum.components)
    for number, (rows_nd, basis_kd) in enumerate(
        zip(rows, spectrum.components.double().chunk(len(rows), 1), strict=True)
    ):
        if len(rows_nd) <= k:
            continue  # an expert with so few rows takes the directions of all
        covariance_dd = torch.cov(rows_nd.T)
        basis_dk, _ = torch.linalg.qr(basis_kd.T)
        captured, best = float((basis_dk.T @ covariance_dd @ basis_dk).trace()), torch.linalg.eigvalsh(covariance_dd)
        if captured < float(best[-k:].sum()) * (1 - RTOL):
            return f"other directions of part {number}"
    return ""


def seen_rows(
    model: nn.Module, samples: Iterable[Sample], *, valid: Valid, forward: Callable[[nn.Module, Sample], Any]
) -> dict[str, Tensor]:
    """Return the rows, in float64, that enter each linear module while the samples pass one by one."""
    rows: dict[str, list[Tensor]] = {}
    current: Sample = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering = (args[0] if args else next(iter(kwargs.values()))).detach()
            counted = valid(name, entering, current)
            flat = entering.reshape(-1, entering.shape[-1]) if counted is None else entering[counted]
            rows.setdefault(name, []).append(flat.double())

        return hook

    handles = [
        module.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, module in (linear_modules(model) | routers(model)).items()
    ]
    with torch.no_grad():
        for sample in samples:
            current.clear()
            current.update(sample)
            forward(model, sample)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def wrong(spectrum: evatune.Spectrum, rows_nd: Tensor) -> str:
    """Say in what a spectrum differs from the exact one of these rows, or nothing."""
    if spectrum.n_rows != len(rows_nd):
        return f"{spectrum.n_rows} rows for {len(rows_nd)}"
    mean_d = rows_nd.mean(0)
    covariance_dd = torch.cov(rows_nd.T).reshape(rows_nd.shape[1], -1)
    total = float(covariance_dd.trace())
    scale = max(total, float(mean_d.square().sum()) * 1e-6, 1e-12)
    if float((spectrum.mean.double() - mean_d).square().sum()) > RTOL**2 * max(scale, float(mean_d.square().sum())):
        return "another mean"
    if abs(spectrum.total_variance - total) > RTOL * scale:
        return f"total variance {spectrum.total_variance:.4g} for {total:.4g}"
    k = len(spectrum.singular_values)
    best_k = torch.linalg.eigvalsh(covariance_dd).flip(0)[:k]
    if float((spectrum.explained_variance.double() - best_k).abs().max()) > RTOL * scale:
        return "other variances"
    basis_kd = spectrum.components.double()
    captured = float((basis_kd @ covariance_dd @ basis_kd.T).trace())
    return "" if captured > float(best_k.sum()) - RTOL * scale else "other directions"


def outputs(model: Any, batch: Sample, forward: Callable[[nn.Module, Sample], Any]) -> list[Tensor]:
    """Return all floating tensors that a model answers with."""

    def tensors(value: Any) -> Iterable[Tensor]:
        if isinstance(value, Tensor):
            yield from [value] if value.is_floating_point() else []
        elif isinstance(value, Mapping):
            for part in value.values():
                yield from tensors(part)
        elif isinstance(value, tuple | list):
            for part in value:
                yield from tensors(part)

    with torch.no_grad():
        torch.manual_seed(0)
        return [tensor.clone() for tensor in tensors(forward(model, batch))]


def call(model: nn.Module, sample: Sample) -> Any:
    return model(**sample)


def all_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., evatune.Spectra]:
    """Hold a family against the oracle, and take it to PEFT and back.

    Args of the returned function:
        build: makes the model; each call makes an equal one.
        samples: one batch of one each, without padding.
        collate: makes a padded batch of some samples.
        valid: where the model's own padding or a look at padding forbids to take all rows: which positions of what
            enters a module count, from its name, the tensor and the sample.
        together: pass the batches to the oracle instead of the samples, since some rows come once a pass, however
            large the batch is, or depend on the whole batch; without padding only.
        may_say: whether evatune may say, instead of being right, that it cannot tell which rows count.
        heads: regular expression for the modules that may be left out beside the output embeddings.
        unreached: regular expression for targets that these batches never reach, which is said.
        peft: settings of `LoraConfig`, where "all-linear" is more than PEFT can do.
    """

    def run(
        build: Callable[[], nn.Module],
        samples: list[Sample],
        *,
        collate: Callable[[list[Sample]], Sample] = collated,
        valid: Valid = lambda name, entering, sample: None,
        together: bool = False,
        may_say: bool = False,
        heads: str = HEADS,
        unreached: str | None = None,
        peft: Mapping[str, Any] | None = None,
        forward: Callable[[nn.Module, Sample], Any] = call,
    ) -> evatune.Spectra:
        model: Any = build()
        batches = [collate(samples[i : i + 4]) for i in range(0, len(samples), 4)]
        truth = seen_rows(model, batches if together else samples, valid=valid, forward=forward)
        of_parts = seen_parts(model, samples, forward=forward)
        before, n_hooks = copy.deepcopy(model.state_dict()), all_hooks(model)
        measured = {"n_components": N_COMPONENTS, "tau": None, "min_gain": None, "progress": False}
        if forward is not call:
            measured["forward"] = forward
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            spectra = evatune.measure(model, batches, **measured)
        said = [str(warning.message) for warning in caught if issubclass(warning.category, evatune.EvaWarning)]
        assert all_hooks(model) == n_hooks
        assert not model.training
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

        assert not [name for name in spectra.targets if re.fullmatch(NEVER_TARGETS, name)]
        missing = [
            name for name in [*truth, *of_parts] if name not in spectra.targets and not re.fullmatch(heads, name)
        ]
        embeddings = [id(model.get_output_embeddings())] if hasattr(model, "get_output_embeddings") else []
        assert not [name for name in missing if id(model.get_submodule(name)) not in embeddings]
        # The last matrices of fused experts have an oracle in tests/activations/layers.
        faults = {name: wrong(spectra[name], truth[name]) for name in truth if name in spectra.targets}
        faults |= {name: wrong_parts(spectra[name], rows) for name, rows in of_parts.items() if name in spectra.targets}
        faults = {name: fault for name, fault in faults.items() if fault}
        assert not faults or (may_say and said), faults
        missed = [name for name in linear_modules(model) if unreached and re.fullmatch(unreached, name)]
        assert may_say or bool(said) == bool(missed), said
        assert all(any(name in text for text in said) for name in missed[:1]), said

        settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"} | dict(peft or {})
        expected = outputs(model, batches[0], forward)
        adapted: Any = get_peft_model(model, LoraConfig(**settings)).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            del measured["n_components"]
            evatune.initialize(adapted, batches, **measured)
        assert equal(outputs(adapted, batches[0], forward), expected)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)
        trained = outputs(adapted, batches[0], forward)
        assert not equal(trained, expected)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        loaded: Any = PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
        assert close(outputs(loaded, batches[0], forward), trained, atol=1e-6)
        merged = outputs(loaded.merge_and_unload().eval(), batches[0], forward)
        assert close(merged, trained, atol=1e-4)
        after = unload(adapted).state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return spectra

    return run


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def close(some: list[Tensor], others: list[Tensor], *, atol: float) -> bool:
    return all(torch.allclose(a, b, rtol=10 * atol, atol=atol) for a, b in zip(some, others, strict=True))
