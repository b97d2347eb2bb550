"""Evaluation on held-out examples: loss of the completions, and accuracy of multiple-choice questions.

The head of a language model costs as much as many layers, so logits are computed for the last positions of a batch
only. Examples of similar length share a batch, so that these positions and the padding are few.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from evatune.hardware import autocast
from evatune.tasks.generation.encoding import IGNORED, Collator, encode_examples
from evatune.tasks.generation.example import Example
from evatune.tasks.scores import Metric, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_METRICS = {
    "loss": Metric(columns=("nll", "tokens"), statistic="ratio"),
    "exact": Metric(columns=("exact",), form=".1%"),
    "accuracy": Metric(columns=("right",), form=".1%"),
}
"""`loss`: mean negative log-likelihood of a completion token, in nats. `exact`: share of the completions that greedy
decoding gives token for token, end token included. `accuracy`: share of the multiple-choice questions answered right;
only where there are such questions."""


def evaluate(
    model: torch.nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    batch_tokens: int = 2048,
    bf16: bool = False,
    progress: bool = True,
    dropped: int = 0,
) -> Scores:
    """Measure the loss of completions and the accuracy of choices.

    The choices of most questions have the same beginning (`the correct answer is answer`...). If they differ in one
    token only, one pass gives the probabilities of all choices. Otherwise each choice is scored by the log-likelihood
    of its tokens.

    Args:
        model: a causal language model, with or without adapter; its mode is restored.
        examples: held-out examples.
        tokenizer: the model's tokenizer.
        max_length: longest sequence in tokens.
        batch_tokens: padded tokens in a batch.
        bf16: compute in bfloat16 autocast.
        progress: show a progress bar on a terminal.
        dropped: rows that were left out before, for the counts.

    Returns:
        `loss`, `exact`, and `accuracy` if there are multiple-choice questions.
    """
    started = time.perf_counter()
    rows = _rows(examples, tokenizer, max_length=max_length)
    nll, tokens, exact = ([0.0] * len(examples) for _ in range(3))
    picks: dict[int, int] = {}
    likelihoods: dict[int, dict[int, float]] = {}
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(rows), desc="evaluate", unit="row", leave=False, disable=None if progress else True) as bar:
            for batch in _bucketed(rows, batch_tokens):
                for row, log_likelihood, is_exact, picked in _score(model, batch, Collator(tokenizer), bf16=bf16):
                    index = row["example"]
                    if row["choice"] is not None:
                        likelihoods.setdefault(index, {})[row["choice"]] = log_likelihood
                        continue
                    nll[index], tokens[index], exact[index] = -log_likelihood, _learned(row["labels"]), is_exact
                    if picked is not None:
                        picks[index] = picked
                bar.update(len(batch))
    finally:
        model.train(was_training)
    for index, by_choice in likelihoods.items():
        picks[index] = max(by_choice, key=lambda choice: by_choice[choice])
    right = [float(picks[index] == examples[index].answer) for index in sorted(picks)]
    return Scores(
        headline="loss",
        metrics={name: metric for name, metric in _METRICS.items() if right or name != "accuracy"},
        outcomes={"nll": nll, "tokens": tokens, "exact": [float(is_exact) for is_exact in exact], "right": right},
        counts={"examples": len(examples), "tokens": int(sum(tokens)), "questions": len(right), "dropped": dropped},
        seconds=time.perf_counter() - started,
    )


def _rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[dict[str, Any]]:
    """Return the rows to run: each example with its true completion, and with its other choices if they need passes."""
    encoded = encode_examples(examples, tokenizer, max_length=max_length)
    rows: list[dict[str, Any]] = []
    for index, example in enumerate(examples):
        row: dict[str, Any] = {**encoded[index], "example": index, "choice": None, "fork": None}
        rows.append(row)
        if example.answer is None:
            continue
        variants = [replace(example, pieces=(*example.pieces[:-1], (choice, True))) for choice in example.choices]
        alternatives = encode_examples(variants, tokenizer, max_length=max_length).rows
        columns = zip(*(alternative["input_ids"] for alternative in alternatives), strict=False)
        shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
        forks = [alternative["input_ids"][shared : shared + 1] for alternative in alternatives]
        rests = {tuple(alternative["input_ids"][shared + 1 :]) for alternative in alternatives}
        if len({tuple(fork) for fork in forks}) == len(forks) and all(forks) and len(rests) == 1:
            row["fork"] = (shared, [fork[0] for fork in forks])
        else:
            rows += [
                {**alternative, "example": index, "choice": choice, "fork": None}
                for choice, alternative in enumerate(alternatives)
            ]
    return rows


def _bucketed(rows: list[dict[str, Any]], batch_tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Yield batches of rows of similar length, the longest first, so that a lack of memory shows in the first batch."""
    batch: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        if batch and (len(batch) + 1) * len(batch[0]["input_ids"]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def _score(
    model: torch.nn.Module, batch: list[dict[str, Any]], collate: Collator, *, bf16: bool
) -> list[tuple[dict[str, Any], float, bool, int | None]]:
    """Return for each row its log-likelihood, whether greedy decoding gives it, and the choice picked at a fork."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in collate(batch).items()}
    labels = inputs.pop("labels")
    first = min(_first_learned(row) for row in batch)
    kept = labels.shape[1] - first + 1  # logits of position p - 1 predict token p
    if takes_logits_to_keep(model):
        inputs["logits_to_keep"] = kept  # type: ignore[assignment]
    with autocast(device, "bfloat16" if bf16 else None):
        logits: Tensor = model(**inputs, use_cache=False).logits
    logits = logits[:, -kept:].float()  # [:, j] tells of token first + j
    targets = labels[:, first:]
    chosen = logits[:, :-1].gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    log_probs = chosen - logits[:, :-1].logsumexp(dim=-1)
    sums = log_probs.masked_fill(targets == IGNORED, 0).sum(dim=-1).tolist()
    greedy = ((logits[:, :-1].argmax(dim=-1) == targets) | (targets == IGNORED)).all(dim=-1).tolist()
    picks: list[int | None] = []
    for index, row in enumerate(batch):
        position, tokens = row["fork"] or (None, None)
        picks.append(None if position is None else int(logits[index, position - first, tokens].argmax()))
    return list(zip(batch, sums, greedy, picks, strict=True))


def _learned(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])


def _first_learned(row: dict[str, Any]) -> int:
    return next((index for index, label in enumerate(row["labels"]) if label != IGNORED and index), 1)


def takes_logits_to_keep(model: Any) -> bool:
    """Return whether the model can compute the logits of the last positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
