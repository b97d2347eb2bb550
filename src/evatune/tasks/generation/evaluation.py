"""Scores on held-out examples: by the likelihood of what is right, and by answers that the model writes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from evatune.tasks.generation.answers import JUDGES, check_judges
from evatune.tasks.generation.example import Example
from evatune.tasks.generation.likelihood import Likelihood, score
from evatune.tasks.generation.outcomes import Outcomes
from evatune.tasks.generation.programming import judge_programs
from evatune.tasks.generation.sandbox import report
from evatune.tasks.generation.writing import Sampling, write_answers
from evatune.tasks.journal import Journal
from evatune.tasks.scores import Scores
from evatune.tasks.task import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        scoring: `likelihood`: loss, and `accuracy`, the share of the questions whose right choice is the most probable
            one; `generated`: the share of the written answers that are right; or `both`.
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
        EvaError: answers are to be written that cannot be judged here.
    """
    started = time.perf_counter()
    journal = journal or Journal()
    written = [index for index, example in enumerate(examples) if example.judge]
    if scoring != "likelihood":
        check_judges(examples, allow_code_execution=True)  # who calls this has asked for permission
    if scoring != "likelihood" and any(examples[index].program for index in written):
        report()  # if no program can run here, that is known before any is written
    batching: dict[str, Any] = {"batch_tokens": batch_tokens, "bf16": bf16}
    with evaluating(model):
        if scoring != "generated":
            known = journal.known("likelihood").keys()
            batches = score(model, examples, tokenizer, max_length=max_length, skip=known, **batching)
            with _bar("score", len(examples), journal, part="likelihood", progress=progress) as bar:
                for batch in batches:
                    journal.add("likelihood", [(index, asdict(likelihood)) for index, likelihood in batch])
                    bar.update(len(batch))
        if scoring != "likelihood":
            skip = journal.known("written").keys() | (set(range(len(examples))) - set(written))
            options: dict[str, Any] = {"sampling": sampling or Sampling(), "max_length": max_prompt or max_length}
            texts = write_answers(model, examples, tokenizer, skip=skip, **options, **batching)
            with _bar("write", len(written), journal, part="written", progress=progress) as bar:
                for answered in texts:
                    journal.add("written", _judged([(index, examples[index], found) for index, found in answered]))
                    bar.update(len(answered))
    found = Outcomes(examples)
    if likelihoods := journal.known("likelihood"):
        found.add_likelihoods([Likelihood(**likelihoods[index]) for index in range(len(examples))])
    if answers := journal.known("written"):
        prompts = [examples[index] for index in answers]
        found.add_answers(answers, n_shortened=_n_longer(prompts, tokenizer, max_length=max_prompt or max_length))
    return found.scores(dropped=dropped, seconds=time.perf_counter() - started)


def _n_longer(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> int:
    """Return how many prompts are longer than the longest one that is answered."""
    lengths = [
        len(tokenizer(example.prompt, add_special_tokens=example.special_tokens, verbose=False)["input_ids"])
        for example in examples
    ]
    return sum(length > max_length for length in lengths)


def _judged(batch: Sequence[tuple[int, Example, Sequence[str]]]) -> list[tuple[int, dict[str, Any]]]:
    """Return written answers with what each gives and whether it is right; programs run side by side."""
    programs = [(text, example) for _, example, texts in batch if example.program for text in texts]
    ran = iter(judge_programs(programs))
    found = []
    for index, example, texts in batch:
        verdicts = [next(ran) if example.program else JUDGES[example.judge](text, example) for text in texts]
        found.append((index, {"texts": list(texts), "verdicts": [asdict(verdict) for verdict in verdicts]}))
    return found


def _bar(name: str, total: int, journal: Journal, *, part: str, progress: bool) -> Any:
    done = len(journal.known(part))
    return tqdm(total=total, initial=done, desc=name, unit="example", leave=False, disable=None if progress else True)
