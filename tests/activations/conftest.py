"""Tiny models of every kind, built from configs, their batches, and what plain hooks see of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 64


def _spread(model: nn.Module) -> nn.Module:
    """Enlarge the weights: transformers starts them so small that all layers see much the same."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.eval()


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            num_labels=3,
        )
    )


_BUILDERS = {"llama": _llama, "gpt2": _gpt2, "bert": _bert, "t5": _t5, "vit": _vit}


@pytest.fixture(scope="session")
def build() -> Callable[..., nn.Module]:
    """Build a tiny model by its kind."""

    def make(kind: str, *, seed: int = 0) -> nn.Module:
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        model = _spread(_BUILDERS[kind]())
        torch.set_rng_state(state)
        return model

    return make


@pytest.fixture(scope="session")
def batches_for() -> Callable[..., list[dict[str, Tensor]]]:
    """Batches as each kind of model takes them, with padding of different lengths."""

    def make(kind: str, n_batches: int = 3, *, size: int = 6, length: int = 12, seed: int = 0) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        frequencies = 1 / torch.arange(1.0, VOCABULARY)

        def tokens(t: int) -> Tensor:
            return 1 + torch.multinomial(frequencies, size * t, replacement=True, generator=generator).view(size, t)

        def mask(t: int) -> Tensor:
            lengths = torch.randint(2, t + 1, (size, 1), generator=generator)
            return (torch.arange(t) < lengths).long()

        batches: list[dict[str, Any]] = []
        for _ in range(n_batches):
            if kind == "vit":
                pixels = torch.randn(size, 3, 16, 16, generator=generator)
                batches.append({"pixel_values": pixels, "labels": torch.randint(0, 3, (size,), generator=generator)})
                continue
            batch = {"input_ids": tokens(length), "attention_mask": mask(length)}
            if kind == "bert":
                batch["labels"] = torch.randint(0, 2, (size,), generator=generator)
            elif kind == "t5":
                t = length - 4
                batch["labels"] = tokens(t).masked_fill(mask(t) == 0, -100)
            else:
                prompt = torch.arange(length) < length // 3
                batch["labels"] = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | prompt, -100)
            batches.append(batch)
        return batches

    return make


class Seen:
    """The activations that plain hooks saw, in float64."""

    def __init__(self) -> None:
        self.rows: dict[str, list[np.ndarray]] = {}

    def matrix(self, name: str) -> np.ndarray:
        return np.concatenate(self.rows[name])

    def check(self, name: str, spectrum: Any, *, rtol: float = 2e-3, n_compared: int = 3) -> None:
        """Compare a spectrum with scikit-learn's PCA of these rows."""
        rows = self.matrix(name)
        assert spectrum.n_rows == len(rows), name
        truth = PCA(svd_solver="full").fit(rows)
        np.testing.assert_allclose(spectrum.mean, truth.mean_, rtol=1e-4, atol=1e-4, err_msg=name)
        total = truth.explained_variance_.sum()
        assert spectrum.total_variance == pytest.approx(total, rel=rtol), name
        k = len(spectrum.singular_values)
        np.testing.assert_allclose(
            spectrum.explained_variance, truth.explained_variance_[:k], rtol=rtol, atol=rtol * total, err_msg=name
        )
        gaps = truth.singular_values_[:-1] / np.maximum(truth.singular_values_[1:], 1e-12) > 1.02
        for j in range(min(n_compared, k)):
            if gaps[j] and (j == 0 or gaps[j - 1]):
                cosine = abs(float(spectrum.components[j].double().numpy() @ truth.components_[j]))
                assert cosine > 0.999, f"component {j} of {name}"


@pytest.fixture(scope="session")
def observe() -> Callable[..., Seen]:
    """Pass batches through a model and keep the inputs of named modules.

    `select(name, batch)` returns a boolean mask of the positions that count, or None for all.
    """

    def run(
        model: nn.Module,
        batches: Iterable[Any],
        names: Iterable[str],
        *,
        select: Callable[[str, Any], Tensor | None] = lambda name, batch: None,
        forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(**batch),
    ) -> Seen:
        seen = Seen()
        current: list[Any] = [None]
        modules = dict(model.named_modules())

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                activation = args[0] if args else next(iter(kwargs.values()))
                mask = select(name, current[0])
                rows = activation.reshape(-1, activation.shape[-1]) if mask is None else activation[mask.bool()]
                seen.rows.setdefault(name, []).append(rows.detach().double().numpy())

            return hook

        handles = [modules[name].register_forward_pre_hook(keep(name), with_kwargs=True) for name in names]
        with torch.no_grad():
            for batch in batches:
                current[0] = batch
                forward(model, batch)
        for handle in handles:
            handle.remove()
        return seen

    return run


QUIET = {"progress": False, "tau": None, "min_gain": None, "n_components": 6}
"""No bar and no stopping rule, so that all batches count."""


@pytest.fixture(scope="session")
def quiet() -> dict[str, Any]:
    return dict(QUIET)
