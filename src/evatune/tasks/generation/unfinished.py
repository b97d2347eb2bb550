"""Answers that are being written together: their tokens, and the cache of keys and values.

Prompts are padded on the left, so that the next token of every row has the same place. After each call of `write`, the
rows whose answer has ended leave, and others can join if the model's cache is one of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from evatune.hardware import autocast
from evatune.tasks.generation.encoding import Collator

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedTokenizerBase

_LOOKED_AT = 16
"""Last tokens in which the beginning of what ends an answer is searched for."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt as tokens."""

    index: int
    """Its place among the examples."""
    ids: list[int]
    """Its tokens."""
    stops: tuple[str, ...]
    """Strings that end the answer."""


class Unfinished:
    """Answers that are being written, one a row.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's tokenizer.
        prompts: what is answered, one a row.
        max_new_tokens: longest answer in tokens.
        choice: how tokens are chosen, as settings of transformers' `GenerationConfig`.
        bf16: compute in bfloat16 autocast.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        choice: dict[str, Any],
        bf16: bool = False,
    ) -> None:
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self.device = next(model.parameters()).device
        self._model, self._tokenizer, self._choice, self._bf16 = model, tokenizer, choice, bf16
        self._pad, self._ends = Collator(tokenizer).pad_token_id, _ends(model, tokenizer)
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = [[self._pad] * (longest - len(prompt.ids)) + prompt.ids for prompt in prompts]
        mask = [[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
        self._ids, self._mask = torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)
        self._written = [0] * len(prompts)
        self._cache: Any = None

    def __len__(self) -> int:
        return len(self.prompts)

    def write(self, n_tokens: int | None = None) -> list[tuple[Prompt, str]]:
        """Write so many tokens to every row, or all; return the answers that have ended, whose rows leave.

        Fewer tokens are written where all rows end before, or one of them has its longest answer.
        """
        left = self.max_new_tokens - max(self._written)
        ended = self._generate(left if n_tokens is None else min(n_tokens, left))
        over = [end or n >= self.max_new_tokens for end, n in zip(ended, self._written, strict=True)]
        answers = [self._answer(row) for row in range(len(self)) if over[row]]
        if answers:
            self._keep([row for row in range(len(self)) if not over[row]])
        return answers

    def _answer(self, row: int) -> tuple[Prompt, str]:
        """Return the prompt of a row, and its answer without what ends it."""
        written = self._ids[row, self._ids.shape[1] - self._written[row] :]
        text = self._tokenizer.batch_decode([written.tolist()], skip_special_tokens=True)[0]
        return self.prompts[row], _until(text, self.prompts[row].stops)

    def _generate(self, n_tokens: int) -> list[bool]:
        """Write tokens, and return which answers have ended by a token or a string."""
        from transformers import GenerationConfig, StoppingCriteriaList

        length = self._ids.shape[1]
        stops = _Stops(self.prompts, self._tokenizer, written=self._written, length=length)
        config = GenerationConfig(
            max_new_tokens=n_tokens,
            pad_token_id=self._pad,
            eos_token_id=self._ends or None,
            use_cache=True,
            return_dict_in_generate=True,
            **self._choice,
        )
        with _without_own_settings(self._model), autocast(self.device, "bfloat16" if self._bf16 else None):
            out = self._model.generate(
                input_ids=self._ids,
                attention_mask=self._mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([stops] if any(row.stops for row in self.prompts) else []),
                **({} if self._cache is None else {"past_key_values": self._cache}),
            )
        self._ids = out if isinstance(out, Tensor) else out.sequences  # a `generate` of the model's own may be simpler
        self._cache = getattr(out, "past_key_values", None)
        new = self._ids[:, length:]
        self._mask = pad(self._mask, (0, new.shape[1]), value=1)
        self._written = [n + new.shape[1] for n in self._written]
        if new.shape[1] < n_tokens:
            return [True] * len(self)
        ends = torch.tensor(self._ends, dtype=new.dtype)
        return (stops.ended | torch.isin(new.cpu(), ends).any(1)).tolist()

    def join(self, others: Unfinished) -> None:
        """Take the rows of others, of the same model; at least one token of all of them is written."""
        self._cache = _cache_of(
            (_stacked(keys, more_keys, dim=-2), _stacked(values, more_values, dim=-2))
            for (keys, values), (more_keys, more_values) in zip(_pairs(self._cache), _pairs(others._cache), strict=True)
        )
        self._ids = _stacked(self._ids, others._ids, dim=-1, value=self._pad)
        self._mask = _stacked(self._mask, others._mask, dim=-1)
        self.prompts, self._written = self.prompts + others.prompts, self._written + others._written

    def _keep(self, rows: list[int]) -> None:
        """Let all other rows leave, and with them the padding that only they needed."""
        self.prompts, self._written = [self.prompts[row] for row in rows], [self._written[row] for row in rows]
        if not rows:
            return
        mask = self._mask[rows]
        first = int(mask.any(0).int().argmax())
        self._ids, self._mask = self._ids[rows, first:], mask[:, first:]
        self._cache = _cache_of(
            [(keys[rows, :, first:], values[rows, :, first:]) for keys, values in _pairs(self._cache)]
        )


class _Stops:
    """Ends a row once its answer holds one of its strings, and knows which rows have ended."""

    def __init__(
        self, prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, *, written: list[int], length: int
    ) -> None:
        self.tokenizer, self.written, self.length = tokenizer, written, length
        self.strings = [prompt.stops for prompt in prompts]
        self.ended = torch.zeros(len(self.strings), dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        new = input_ids.shape[1] - self.length
        last = input_ids[:, -_LOOKED_AT:].tolist()
        texts = self.tokenizer.batch_decode(
            [ids[-(written + new) :] for ids, written in zip(last, self.written, strict=True)]
        )
        found = [any(one in text for one in strings) for text, strings in zip(texts, self.strings, strict=True)]
        self.ended |= torch.tensor(found)
        return self.ended.to(input_ids.device)


def _stacked(above: Tensor, below: Tensor, *, dim: int, value: int = 0) -> Tensor:
    """Return the rows of both, the shorter ones padded on the left."""
    length = max(above.shape[dim], below.shape[dim])
    after = (0, 0) * (-1 - dim)
    return torch.cat([pad(rows, (*after, length - rows.shape[dim], 0), value=value) for rows in (above, below)])


def _pairs(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of each layer, both `(rows, heads, length, width)`."""
    return [(keys, values) for keys, values, *_ in cache]


def _cache_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    """Return a cache with these keys and values, layer by layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(pairs):
        cache.update(keys, values, layer)
    return cache


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


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, and those that the model names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


def _until(text: str, stops: Sequence[str]) -> str:
    """Return what stands before the first of the strings that end it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
