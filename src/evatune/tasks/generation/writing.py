"""Written answers: many prompts at a time, with the cache of keys and values, each until its end."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evatune.hardware import autocast
from evatune.tasks.generation.encoding import Collator
from evatune.tasks.generation.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOKED_AT = 16
"""Last tokens in which the beginning of what ends an answer is searched for."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are written."""

    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """Randomness; 0 takes the most probable token each time."""
    top_p: float = 1.0
    """Sample from the most probable tokens that have this share together."""
    samples: int = 1
    """Answers to each prompt."""
    seed: int = 0
    """Of sampling; a batch is sampled the same way whatever was written before it."""


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """One prompt as tokens."""

    index: int
    """Its place among the examples."""
    ids: list[int]
    """Its tokens."""
    stops: tuple[str, ...]
    """Strings that end the answer."""


def write_answers(
    model: Any,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sampling: Sampling,
    max_length: int = 512,
    batch_tokens: int = 4096,
    bf16: bool = False,
    skip: Container[int] = (),
) -> Iterator[list[tuple[int, list[str]]]]:
    """Yield batches of examples with the answers that a model writes to their prompts.

    Prompts are padded on the left, so that all answers of a batch begin at one position.

    Args:
        model: a causal language model in evaluation mode.
        examples: their prompts are answered.
        tokenizer: the model's tokenizer.
        sampling: how the answers are written.
        max_length: longest prompt in tokens; a longer one loses its beginning.
        batch_tokens: positions of prompts and answers that are in memory at a time.
        bf16: compute in bfloat16 autocast.
        skip: places among the examples that are left out.

    Returns:
        (place among the examples, its answers without what ends them) in batches.
    """
    wanted = {index: example for index, example in enumerate(examples) if index not in skip}
    for batch in _batches(_prompts(wanted, tokenizer, max_length=max_length), batch_tokens, sampling):
        seed = sampling.seed + batch[0].index  # also where batches before this one are left out
        texts = _write(model, batch, tokenizer, sampling=sampling, seed=seed, bf16=bf16)
        yield [
            (prompt.index, texts[place * sampling.samples : (place + 1) * sampling.samples])
            for place, prompt in enumerate(batch)
        ]


def _prompts(examples: Mapping[int, Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[_Prompt]:
    prompts = []
    for index, example in examples.items():
        ids = tokenizer(example.prompt, add_special_tokens=example.special_tokens, verbose=False)["input_ids"]
        if example.special_tokens and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers end every text
        if len(ids) > max_length:
            ids = ids[:1] + ids[len(ids) - max_length + 1 :]
        prompts.append(_Prompt(index=index, ids=ids or [_begin(tokenizer)], stops=example.stops))
    return prompts


def _begin(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what an empty prompt is written as."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def _batches(prompts: list[_Prompt], batch_tokens: int, sampling: Sampling) -> Iterator[list[_Prompt]]:
    """Yield prompts of like length, the longest first."""
    batch: list[_Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: -len(prompt.ids)):
        one = sampling.samples * (len((batch or [prompt])[0].ids) + sampling.max_new_tokens)
        if batch and (len(batch) + 1) * one > batch_tokens:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


@torch.inference_mode()
def _write(
    model: Any,
    batch: list[_Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sampling: Sampling,
    seed: int,
    bf16: bool,
) -> list[str]:
    from transformers import GenerationConfig, StoppingCriteriaList

    device = next(model.parameters()).device
    pad = Collator(tokenizer).pad_token_id
    longest = max(len(prompt.ids) for prompt in batch)
    ids = torch.tensor([[pad] * (longest - len(prompt.ids)) + prompt.ids for prompt in batch], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch], device=device)
    choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.samples,
        pad_token_id=pad,
        eos_token_id=_ends(model, tokenizer),
        use_cache=True,
        **(choice if sampling.temperature else {"do_sample": False}),
    )
    stops = [stop for prompt in batch for stop in [prompt.stops] * sampling.samples]
    criteria = StoppingCriteriaList([_Stops(stops, tokenizer, begins=longest)] if any(stops) else [])
    with (
        _without_own_settings(model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        autocast(device, "bfloat16" if bf16 else None),
    ):
        torch.manual_seed(seed)
        written = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=criteria
        )
    texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return [_until(text, ends) for text, ends in zip(texts, stops, strict=True)]


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Hide a model's own settings of generation, from which transformers takes all that a call leaves out."""
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = getattr(base, "generation_config", None)
    if own is None:  # a model that is not of transformers has none
        yield
        return
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Return the tokens that end an answer: the tokenizer's, and those that the model names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    return sorted(found) or None


def _until(text: str, stops: Sequence[str]) -> str:
    """Return what stands before the first of the strings that end it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


class _Stops:
    """Ends a row once it holds one of its strings."""

    def __init__(self, stops: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, *, begins: int) -> None:
        self.stops, self.tokenizer, self.begins = stops, tokenizer, begins

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, max(self.begins, input_ids.shape[1] - _LOOKED_AT) :])
        ended = [any(stop in text for stop in stops) for text, stops in zip(texts, self.stops, strict=True)]
        return torch.tensor(ended, device=input_ids.device)
