"""Written answers: many prompts at a time, with the cache of keys and values, each until its end.

The most probable answers are written by continuous batching: every few tokens, answers that have ended make room for
the next prompts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from evatune.tasks.generation.example import Example
from evatune.tasks.generation.likelihood import shares_prompts
from evatune.tasks.generation.unfinished import Prompt, Unfinished

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE = 8
"""Tokens after which answers that have ended make room."""


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
    waiting = deque(sorted(_prompts(wanted, tokenizer, max_length=max_length), key=lambda prompt: -len(prompt.ids)))
    make = partial(Unfinished, model, tokenizer, max_new_tokens=sampling.max_new_tokens, bf16=bf16)
    write = _in_batches if sampling.temperature or not shares_prompts(model) else _refilled
    yield from write(waiting, make, sampling=sampling, batch_tokens=batch_tokens)


@torch.inference_mode()
def _refilled(
    waiting: deque[Prompt], make: Callable[..., Unfinished], *, sampling: Sampling, batch_tokens: int
) -> Iterator[list[tuple[int, list[str]]]]:
    """Write the most probable answers; where some have ended, the next prompts take their place."""
    unfinished = None
    while waiting or unfinished:
        batch = _taken(waiting, unfinished.prompts if unfinished else [], batch_tokens, sampling)
        if unfinished and not batch:
            answers = unfinished.write(_PIECE)
        else:
            new = make(prompts=batch, choice=_choice(sampling))
            answers = new.write(1)
            if unfinished and new:
                unfinished.join(new)
            unfinished = unfinished or new
        yield [(prompt.index, [text] * sampling.samples) for prompt, text in answers]


@torch.inference_mode()
def _in_batches(
    waiting: deque[Prompt], make: Callable[..., Unfinished], *, sampling: Sampling, batch_tokens: int
) -> Iterator[list[tuple[int, list[str]]]]:
    """Write batch by batch, so that what is sampled depends on the batch and the seed alone."""
    while waiting:
        batch = _taken(waiting, [], batch_tokens // sampling.samples, sampling)
        repeated = [prompt for prompt in batch for _ in range(sampling.samples)]
        unfinished = make(prompts=repeated, choice=_choice(sampling))
        with torch.random.fork_rng(devices=[unfinished.device] if unfinished.device.type == "cuda" else []):
            torch.manual_seed(sampling.seed + batch[0].index)  # also where batches before this one are left out
            answers = iter(unfinished.write())
        yield [(prompt.index, [text for _, text in islice(answers, sampling.samples)]) for prompt in batch]


def _choice(sampling: Sampling) -> dict[str, Any]:
    """Return how a token is chosen, as settings of transformers' `GenerationConfig`."""
    if not sampling.temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


def _taken(waiting: deque[Prompt], beside: list[Prompt], batch_tokens: int, sampling: Sampling) -> list[Prompt]:
    """Take the prompts that there is room for beside others, the longest first; at least one if there are no others."""
    longest = max(len(prompt.ids) for prompt in [*beside, *islice(waiting, 1)]) + sampling.max_new_tokens
    room = max(batch_tokens // longest, 1) - len(beside)
    return [waiting.popleft() for _ in range(min(room, len(waiting)))]


def _prompts(examples: Mapping[int, Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[Prompt]:
    prompts = []
    for index, example in examples.items():
        ids = tokenizer(example.prompt, add_special_tokens=example.special_tokens, verbose=False)["input_ids"]
        if example.special_tokens and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers end every text
        if len(ids) > max_length:
            ids = ids[:1] + ids[len(ids) - max_length + 1 :]
        prompts.append(Prompt(index=index, ids=ids or [_begin(tokenizer)], stops=example.stops))
    return prompts


def _begin(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what an empty prompt is written as."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)
