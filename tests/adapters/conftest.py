"""Tiny models, built from configs, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices as small as these are slower with two threads, and much slower on a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def llama() -> Callable[..., nn.Module]:
    def build(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = LlamaForCausalLM(config)
        # transformers starts all weights so small that every layer sees much the same.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
        return model.to(dtype).eval()

    return build


@pytest.fixture
def gpt2() -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()

    return build


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.fc(x))


class _Nested(nn.Module):
    """A model in which `layers.1.fc` is also the end of `encoder.layers.1.fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Block() for _ in range(2))
        self.layers = nn.ModuleList(_Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.encoder.layers, *self.layers]:
            x = block(x)
        return x


@pytest.fixture
def nested() -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return _Nested().eval()

    return build


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weights = 1 / torch.arange(1, VOCABULARY + 1)  # some tokens are frequent, as in text
    tokens = [torch.multinomial(weights, 4 * 16, replacement=True, generator=generator) for _ in range(3)]
    return [
        {"input_ids": ids.view(4, 16), "attention_mask": torch.ones(4, 16, dtype=torch.long), "labels": ids.view(4, 16)}
        for ids in tokens
    ]


@pytest.fixture
def vectors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 16, generator=generator) * torch.linspace(0.1, 2, 16) for _ in range(2)]


@pytest.fixture
def lora() -> Callable[..., PeftModel]:
    """Wrap a model with LoRA, r = 4 and alpha = 2 on all linear layers unless told otherwise."""

    def wrap(model: nn.Module, *, adapter_name: str = "default", **settings: object) -> PeftModel:
        settings = {"r": 4, "lora_alpha": 2, "target_modules": "all-linear"} | settings
        return get_peft_model(model, LoraConfig(**settings), adapter_name=adapter_name).eval()

    return wrap


@pytest.fixture
def outputs() -> Callable[..., torch.Tensor]:
    def run(model: nn.Module, batch: object) -> torch.Tensor:
        with torch.no_grad():
            return model(batch) if isinstance(batch, torch.Tensor) else model(**batch).logits

    return run
