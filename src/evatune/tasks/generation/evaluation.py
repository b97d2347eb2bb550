"""Scores on held-out examples: by the likelihood of what is right, and by answers that the model writes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from evatune.errors import EvaError
from evatune.tasks.generation.answers import JUDGES
from evatune.tasks.generation.example import Example
from evatune.tasks.generation.likelihood import Likelihood, score
from evatune.tasks.generation.programming import judge_programs
from evatune.tasks.generation.sandbox import report
from evatune.tasks.generation.writing import Sampling, write_answers
from evatune.tasks.journal import Journal
from evatune.tasks.scores import Metric, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOSS = {
    "loss": Metric(columns=("nll", "tokens"), statistic="ratio"),
    "exact": Metric(columns=("exact",), form=".1%"),
}
"""`loss`: mean negative log-likelihood of a completion token, in nats. `exact`: share of the completions that greedy
decoding gives token for token, end token included."""
SCORINGS = ("likelihood", "generated", "both")
"""`likelihood`: loss, and `accuracy`, the share of the questions whose right choice is the most probable one.
`generated`: the share of the written answers that are right."""


def evaluate(
    model: Any,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    scoring: str = "likelihood",
    sampling: Sampling | None = None,
    max_length: int = 512,
    max_prompt: int | None = None,
    batch_tokens: int = 2048,
    bf16: bool = False,
    progress: bool = True,
    dropped: int = 0,
    journal: Journal | None = None,
) -> Scores:
    """Score a model on held-out examples.

    Args:
        model: a causal language model, with or without adapter; its mode is restored.
        examples: held-out examples.
        tokenizer: the model's tokenizer.
        scoring: one of `SCORINGS`.
        sampling: how answers are written; by default the most probable token each time.
        max_length: longest sequence in tokens.
        max_prompt: longest prompt in tokens that an answer is written to; by default `max_length`.
        batch_tokens: padded tokens in a batch.
        bf16: compute in bfloat16 autocast.
        progress: show a progress bar with the time left, on a terminal.
        dropped: rows that were left out before, for the counts.
        journal: keeps what each batch gave, and knows what was scored before.

    Returns:
        By likelihood `loss`, `exact`, and `accuracy` if there are questions with choices; by written answers
        `generated`, of programs `pass@1` and so on; with several tasks also for each of them, and their mean.

    Raises:
        EvaError: answers are to be written, and no example says how one is judged.
    """
    started = time.perf_counter()
    journal = journal or Journal()
    written = [index for index, example in enumerate(examples) if example.judge]
    if scoring != "likelihood" and not written:
        raise EvaError(
            "none of the held-out examples says what a right answer is, so no written answer can be judged; set "
            "data.scoring to likelihood."
        )
    with _evaluating(model):
        if scoring != "generated":
            batches = score(
                model,
                examples,
                tokenizer,
                max_length=max_length,
                batch_tokens=batch_tokens,
                bf16=bf16,
                skip=journal.known("likelihood").keys(),
            )
            with _bar("score", len(examples), journal, part="likelihood", progress=progress) as bar:
                for batch in batches:
                    journal.add("likelihood", [(index, asdict(likelihood)) for index, likelihood in batch])
                    bar.update(len(batch))
        if scoring != "likelihood":
            answers = write_answers(
                model,
                examples,
                tokenizer,
                sampling=sampling or Sampling(),
                max_length=max_prompt or max_length,
                batch_tokens=batch_tokens,
                bf16=bf16,
                skip=journal.known("written").keys() | (set(range(len(examples))) - set(written)),
            )
            with _bar("write", len(written), journal, part="written", progress=progress) as bar:
                for texts in answers:
                    journal.add("written", _judged([(index, examples[index], found) for index, found in texts]))
                    bar.update(len(texts))
    return _scores(
        examples,
        likelihoods={index: Likelihood(**found) for index, found in journal.known("likelihood").items()},
        answers=journal.known("written"),
        dropped=dropped,
        seconds=time.perf_counter() - started,
    )


def _judged(batch: Sequence[tuple[int, Example, Sequence[str]]]) -> list[tuple[int, dict[str, Any]]]:
    """Return written answers with what each gives and whether it is right; programs run side by side."""
    programs = [(text, example) for _, example, texts in batch if example.program for text in texts]
    ran = iter(judge_programs(programs))
    found = []
    for index, example, texts in batch:
        verdicts = [next(ran) if example.program else JUDGES[example.judge](text, example) for text in texts]
        found.append((index, {"texts": list(texts), "verdicts": [asdict(verdict) for verdict in verdicts]}))
    return found


def _scores(
    examples: Sequence[Example],
    *,
    likelihoods: Mapping[int, Likelihood],
    answers: Mapping[int, Mapping[str, Any]],
    dropped: int,
    seconds: float,
) -> Scores:
    outcomes: dict[str, list[float]] = {}
    metrics: dict[str, Metric] = {}
    counts = {"examples": len(examples)}
    details: list[dict[str, Any]] = [_described(example) for example in examples]
    if likelihoods:
        ordered = [likelihoods[index] for index in range(len(examples))]
        outcomes |= {
            "nll": [found.nll for found in ordered],
            "tokens": [float(found.tokens) for found in ordered],
            "exact": [float(found.exact) for found in ordered],
        }
        metrics |= _LOSS
        counts |= {"tokens": sum(found.tokens for found in ordered), "shortened": sum(found.cut for found in ordered)}
        picked = {index: _largest(found.choices) for index, found in enumerate(ordered) if found.choices}
        for index, detail in enumerate(details):
            detail["loss"] = ordered[index].nll / max(1, ordered[index].tokens)
            if index in picked:
                right = picked[index] == examples[index].answer
                detail |= {"given": examples[index].choices[picked[index]], "right": right}
                detail["likelihoods"] = list(ordered[index].choices)
        right_picks = {index: float(choice == examples[index].answer) for index, choice in picked.items()}
        _add("accuracy", "right", right_picks, examples, metrics=metrics, outcomes=outcomes)
        counts["questions"] = len(picked)
    if answers:
        shares = {index: _share_right(found) for index, found in sorted(answers.items())}
        said = {index: share for index, share in shares.items() if not examples[index].program}
        _add("generated", "written", said, examples, metrics=metrics, outcomes=outcomes)
        ran = {index: answers[index]["verdicts"] for index in shares if examples[index].program}
        for k in _sizes(ran):
            passed = {index: pass_at(k, verdicts) for index, verdicts in ran.items()}
            _add(f"pass@{k}", f"passed@{k}", passed, examples, metrics=metrics, outcomes=outcomes)
        counts |= {
            "answers": sum(len(found["texts"]) for found in answers.values()),
            "unparsed": sum(verdict["given"] is None for found in answers.values() for verdict in found["verdicts"]),
        }
        for index, found in answers.items():
            details[index]["written"] = [
                {"text": text} | verdict for text, verdict in zip(found["texts"], found["verdicts"], strict=True)
            ]
            first = found["verdicts"][0]
            details[index] |= {"given": first["given"], "right": shares[index] == 1.0}
    return Scores(
        headline=next(iter(metrics)),
        metrics=metrics,
        outcomes=outcomes,
        counts=counts | {"dropped": dropped},
        seconds=seconds,
        examples=details,
        notes=(report(),) if any(examples[index].program for index in answers) else (),
    )


def pass_at(k: int, verdicts: Sequence[Mapping[str, Any]]) -> float:
    """Return the probability that one of k programs drawn from those written is right, without bias.

    Chen et al., 2021, Evaluating Large Language Models Trained on Code, equation 1.
    """
    n, right = len(verdicts), sum(verdict["right"] for verdict in verdicts)
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def _sizes(ran: Mapping[int, Sequence[Any]]) -> list[int]:
    """Return the k of pass@k: 1, 10 and 100 as far as there are so many answers, and how many there are."""
    n = min((len(verdicts) for verdicts in ran.values()), default=0)
    return sorted({k for k in (1, 10, 100, n) if 0 < k <= n})


def _add(
    metric: str,
    column: str,
    found: Mapping[int, float],
    examples: Sequence[Example],
    *,
    metrics: dict[str, Metric],
    outcomes: dict[str, list[float]],
) -> None:
    """Add a metric over all examples that have it, and with several tasks their mean and each of them."""
    outcomes[column] = list(found.values())
    if not found:
        return
    metrics[metric] = Metric(columns=(column,), form=".1%")
    tasks = list(dict.fromkeys(sorted(examples[index].task for index in found)))
    if len(tasks) < 2:
        return
    outcomes[f"{column}/task"] = [float(tasks.index(examples[index].task)) for index in found]
    metrics[f"{metric}/mean"] = Metric(columns=(column, f"{column}/task"), statistic="mean_of_groups", form=".1%")
    for task in tasks:
        outcomes[f"{column}/{task}"] = [value for index, value in found.items() if examples[index].task == task]
        metrics[f"{metric}/{task}"] = Metric(columns=(f"{column}/{task}",), form=".1%")


def _described(example: Example) -> dict[str, Any]:
    """Return what was asked and what would be right."""
    detail: dict[str, Any] = {"task": example.task} if example.task else {}
    return detail | {"question": example.question or example.prompt, "expected": example.expected or example.completion}


def _share_right(found: Mapping[str, Any]) -> float:
    verdicts = found["verdicts"]
    return sum(verdict["right"] for verdict in verdicts) / len(verdicts)


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _bar(name: str, total: int, journal: Journal, *, part: str, progress: bool) -> Any:
    done = len(journal.known(part))
    return tqdm(total=total, initial=done, desc=name, unit="example", leave=False, disable=None if progress else True)
