"""Log-likelihoods of completions and of the choices of questions, in batches of like length.

The choices of a question have the same beginning: the prompt, and often the first words of the answer. It passes
through the model once. Where the choices then differ in one token, the logits of that pass hold the probabilities of
all of them. Otherwise the ending of each choice passes with the keys and values of the beginning in the cache.

The head of a language model costs as much as many layers, so logits are computed for the last positions only.

Names of tensors: b examples, t positions, v tokens of the vocabulary, c choices.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evatune.hardware import autocast
from evatune.tasks.generation.encoding import IGNORED, Collator, cut_prompt, encode_examples
from evatune.tasks.generation.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_LIMIT = 1 << 40
_PARTS = {"input_ids": "ids", "labels": "labels"}


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """What a model thinks of one example."""

    nll: float
    """Negative log-likelihood of the completion and its end token, in nats."""
    tokens: int
    """How many tokens these are."""
    exact: bool
    """Whether each of them is the most probable one."""
    choices: tuple[float, ...] = ()
    """Log-likelihood of each choice, without end token."""
    cut: bool = False
    """Whether it was longer than the longest allowed sequence."""


@dataclass(frozen=True, kw_only=True)
class _Passage:
    """One example as tokens."""

    index: int
    """Its place among the examples."""
    ids: list[int]
    """Prompt, right completion, end token."""
    labels: list[int]
    """The same where it is learned, else -100."""
    shared: int = 0
    """Tokens at the beginning that all choices have."""
    endings: tuple[tuple[int, ...], ...] = ()
    """The other tokens of each choice, at least one."""
    learned: tuple[tuple[int, ...], ...] = ()
    """The same where they are learned, else -100."""
    answer: int = 0
    """Which of them is right."""
    cut: bool = False
    """Whether it was longer than it may be."""

    @property
    def first(self) -> int:
        """The first learned position; the very first token is never predicted."""
        return next((place for place, label in enumerate(self.labels) if label != IGNORED and place), 1)

    @property
    def forks(self) -> bool:
        """Whether the choices differ in their last token alone."""
        return bool(self.endings) and all(len(ending) == 1 for ending in self.endings)

    def cost(self, *, shares: bool) -> int:
        """Return how many positions pass through the model; with `shares`, what the choices share passes once."""
        if self.forks or not self.endings:
            return len(self.ids)
        n_choices, longest = len(self.endings), max(map(len, self.endings)) + 1
        return self.shared + n_choices * longest if shares else n_choices * (self.shared + longest)


def score(
    model: Any,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    batch_tokens: int = 2048,
    bf16: bool = False,
    skip: Container[int] = (),
) -> Iterator[list[tuple[int, Likelihood]]]:
    """Yield batches of examples with their likelihoods, the longest first, so that a lack of memory shows at once.

    Args:
        model: a causal language model in evaluation mode.
        examples: what to score.
        tokenizer: the model's tokenizer.
        max_length: longest sequence in tokens; a longer one loses the beginning of its prompt.
        batch_tokens: positions in a batch, padding included.
        bf16: compute in bfloat16 autocast.
        skip: places among the examples that are left out.

    Returns:
        (place among the examples, likelihood) in batches.
    """
    collate, shares = Collator(tokenizer), shares_prompts(model)
    wanted = {index: example for index, example in enumerate(examples) if index not in skip}
    for batch in _batches(_passages(wanted, tokenizer, max_length=max_length), batch_tokens, shares=shares):
        if batch[0].endings and not batch[0].forks:
            found = _with_choices(model, batch, collate, shares=shares, bf16=bf16)
        else:
            found = _completions(model, batch, collate, bf16=bf16)
        yield [(passage.index, likelihood) for passage, likelihood in zip(batch, found, strict=True)]


def _passages(
    examples: Mapping[int, Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Iterator[_Passage]:
    """Yield examples as tokens; all choices are tokenized in one call."""
    variants = [variant for example in examples.values() for variant in (example, *_choices(example))]
    encoded = iter(encode_examples(variants, tokenizer, max_length=_NO_LIMIT).rows)
    end = tokenizer.eos_token_id
    for index, example in examples.items():
        given = [next(encoded), *(next(encoded) for _ in _choices(example))]
        right, *rows = cut_prompt(given, max_length)
        cut = right is not given[0]
        if example.answer is None or not rows:
            yield _Passage(index=index, ids=right["input_ids"], labels=right["labels"], cut=cut)
            continue
        ends = int(example.special_tokens and rows[example.answer]["input_ids"][-1] == end)
        choices = [row["input_ids"][: len(row["input_ids"]) - ends] for row in rows]
        alike = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*choices, strict=False))))
        shared = min(alike, min(map(len, choices)) - 1)
        yield _Passage(
            index=index,
            ids=right["input_ids"],
            labels=right["labels"],
            shared=shared,
            endings=tuple(tuple(choice[shared:]) for choice in choices),
            learned=tuple(
                tuple(row["labels"][shared : len(choice)]) for row, choice in zip(rows, choices, strict=True)
            ),
            answer=example.answer,
            cut=cut,
        )


def _choices(example: Example) -> list[Example]:
    """Return the question once for each choice, with that choice as its completion."""
    if example.answer is None:
        return []
    return [replace(example, pieces=(*example.pieces[:-1], (choice, True))) for choice in example.choices]


def _batches(passages: Iterator[_Passage], batch_tokens: int, *, shares: bool) -> Iterator[list[_Passage]]:
    """Yield passages of like length that are scored in the same way."""
    batch: list[_Passage] = []

    def kind(passage: _Passage) -> int:
        return 0 if passage.forks else len(passage.endings)

    for passage in sorted(passages, key=lambda passage: (kind(passage), -passage.cost(shares=shares))):
        largest = (batch or [passage])[0].cost(shares=shares)
        if batch and (kind(passage) != kind(batch[0]) or (len(batch) + 1) * largest > batch_tokens):
            yield batch
            batch = []
        batch.append(passage)
    if batch:
        yield batch


@torch.inference_mode()
def _completions(model: Any, batch: list[_Passage], collate: Collator, *, bf16: bool) -> list[Likelihood]:
    """Score completions, and the choices that differ in their last token, by one pass."""
    first = min(passage.first for passage in batch)
    rows = collate([{"input_ids": passage.ids, "labels": passage.labels} for passage in batch])
    targets_bt = rows.pop("labels")[:, first:]
    logits_btv, _ = _logits(model, rows, kept=targets_bt.shape[1] + 1, bf16=bf16)  # [:, j] tells of token first + j
    log_probs_bt, greedy_bt = _of_targets(logits_btv[:, :-1], targets_bt)
    found = []
    for row, passage in enumerate(batch):
        fork = passage.shared - first
        choices: tuple[float, ...] = ()
        if passage.endings:
            at_fork_v = logits_btv[row, fork].float().log_softmax(-1)  # the last token of a choice is learned
            common = float(log_probs_bt[row, :fork].sum())
            choices = tuple(common + at_fork_v[[ending[0] for ending in passage.endings]].double().cpu().numpy())
        found.append(_likelihood(passage, log_probs_bt[row], greedy_bt[row], choices))
    return found


@torch.inference_mode()
def _with_choices(
    model: Any, batch: list[_Passage], collate: Collator, *, shares: bool, bf16: bool
) -> list[Likelihood]:
    """Score choices of several tokens; what they share passes once, or with each where the model has no such cache."""
    ends = [passage.ids[passage.shared + len(passage.endings[passage.answer]) :] for passage in batch]
    n_choices = len(batch[0].endings)
    endings = [
        {"input_ids": [*ids, *more], "labels": [*labels, *more]}
        for passage, end in zip(batch, ends, strict=True)
        for choice, (ids, labels) in enumerate(zip(passage.endings, passage.learned, strict=True))
        for more in [end if choice == passage.answer else []]
    ]
    first = min(min(passage.first, passage.shared) for passage in batch)
    if shares:
        log_probs, greedy = _endings_with_cache(model, batch, endings, collate, bf16=bf16)
    else:
        log_probs, greedy = _endings_alone(model, batch, endings, collate, first=first, bf16=bf16)
    found = []
    for number, passage in enumerate(batch):
        mine = slice(number * n_choices, (number + 1) * n_choices)
        choices = tuple(
            float(line[: len(line) - (len(ends[number]) if choice == passage.answer else 0)].sum())
            for choice, line in enumerate(log_probs[mine])
        )
        right = number * n_choices + passage.answer
        found.append(_likelihood(passage, log_probs[right], greedy[right], choices))
    return found


def _endings_with_cache(
    model: Any, batch: list[_Passage], endings: list[dict[str, list[int]]], collate: Collator, *, bf16: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return log-probabilities of the learned tokens of each choice, and whether each is the most probable one."""
    device = next(model.parameters()).device
    n_choices = len(batch[0].endings)
    longest = max(passage.shared for passage in batch)
    gaps = [longest - passage.shared for passage in batch]
    ids = torch.tensor(
        [[collate.pad_token_id] * gap + passage.ids[: passage.shared] for gap, passage in zip(gaps, batch, strict=True)]
    )
    mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    kept = max(1, *(passage.shared - min(passage.first, passage.shared) + 1 for passage in batch))
    rows = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits_btv, cache = _logits(model, rows, kept=kept, bf16=bf16, use_cache=True)
    cache.batch_repeat_interleave(n_choices)
    tails = collate(endings)
    targets = tails.pop("labels").to(device)
    starts = mask.sum(-1).repeat_interleave(n_choices).unsqueeze(1)
    rows = {
        "input_ids": tails["input_ids"],
        "attention_mask": torch.cat([mask.repeat_interleave(n_choices, dim=0), tails["attention_mask"]], dim=1),
        "position_ids": starts + torch.arange(targets.shape[1]),
    }
    # The last ending needs no logits beyond its last token, so one position less is computed.
    later_btv, _ = _logits(model, rows, kept=targets.shape[1], bf16=bf16, past_key_values=cache)
    later, later_greedy = _of_targets(later_btv[:, :-1], targets[:, 1:])
    at_first, first_greedy = _of_targets(logits_btv[:, -1:].repeat_interleave(n_choices, dim=0), targets[:, :1])
    log_probs, greedy = [], []
    for number, ending in enumerate(endings):
        passage = batch[number // n_choices]
        begun = passage.shared - passage.first  # learned tokens before the choices part
        before: list[Tensor] = [torch.empty(0, device=device), torch.empty(0, dtype=torch.bool, device=device)]
        if begun > 0:
            known = torch.tensor([passage.labels[passage.first : passage.shared]], device=device)
            pair = _of_targets(logits_btv[number // n_choices, -begun - 1 : -1].unsqueeze(0), known)
            before = [part[0] for part in pair]
        length = len(ending["labels"]) - 1
        log_probs.append(torch.cat([before[0], at_first[number], later[number, :length]]))
        greedy.append(torch.cat([before[1], first_greedy[number], later_greedy[number, :length]]))
    return log_probs, greedy


def _endings_alone(
    model: Any, batch: list[_Passage], endings: list[dict[str, list[int]]], collate: Collator, *, first: int, bf16: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the same from one pass of the whole text of each choice."""
    n_choices = len(batch[0].endings)
    rows = []
    for number, ending in enumerate(endings):
        passage = batch[number // n_choices]
        rows.append({name: getattr(passage, part)[: passage.shared] + ending[name] for name, part in _PARTS.items()})
    inputs = collate(rows)
    targets = inputs.pop("labels")[:, first:]
    logits_btv, _ = _logits(model, inputs, kept=targets.shape[1] + 1, bf16=bf16)
    log_probs, greedy = _of_targets(logits_btv[:, :-1], targets)
    lengths = [len(row["labels"]) - first for row in rows]
    return (
        [line[:length] for line, length in zip(log_probs, lengths, strict=True)],
        [line[:length] for line, length in zip(greedy, lengths, strict=True)],
    )


def _logits(
    model: Any, rows: dict[str, Tensor], *, kept: int, bf16: bool, use_cache: bool = False, **more: Any
) -> tuple[Tensor, Any]:
    """Return the logits of the last `kept` positions, and the cache."""
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in rows.items()} | more
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = kept
    with autocast(device, "bfloat16" if bf16 else None):
        output = model(**inputs, use_cache=use_cache or bool(more))
    return output.logits[:, -kept:], getattr(output, "past_key_values", None)


def _of_targets(logits_btv: Tensor, targets_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens (0 where nothing is learned), and whether each is the most probable one."""
    targets_bt = targets_bt.to(logits_btv.device)
    logits_btv = logits_btv.float()
    chosen = logits_btv.gather(-1, targets_bt.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ignored = targets_bt == IGNORED
    log_probs = (chosen - logits_btv.logsumexp(dim=-1)).masked_fill(ignored, 0)
    return log_probs, (logits_btv.argmax(dim=-1) == targets_bt) | ignored


def _likelihood(passage: _Passage, log_probs: Tensor, greedy: Tensor, choices: tuple[float, ...]) -> Likelihood:
    tokens = sum(label != IGNORED for label in passage.labels[1:])
    return Likelihood(
        nll=-float(log_probs.sum()),
        tokens=tokens,
        exact=bool(greedy.all()),
        choices=tuple(map(float, choices)),
        cut=passage.cut,
    )


def takes(model: Any, argument: str) -> bool:
    """Return whether the model's `forward` has an argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(base.forward).parameters


def shares_prompts(model: Any) -> bool:
    """Return whether the model's cache can be repeated for several continuations: keys and values in every layer."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if not takes(model, "position_ids") or not takes(model, "past_key_values"):
        return False
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, TypeError, ValueError):
        return False
    return all(type(layer) is DynamicLayer for layer in layers)
