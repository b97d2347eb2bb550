"""Extractive question answering: where in a context the answer to a question stands, in SQuAD's format.

Rajpurkar et al. 2016 (arXiv:1606.05250), and 2018 (arXiv:1806.03822) for questions without answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evatune.errors import EvaError
from evatune.tasks.disk_list import empty_list
from evatune.tasks.examples import Convert
from evatune.tasks.rows import Row
from evatune.tasks.scores import Metric
from evatune.tasks.understanding.answers import agreement, best_span
from evatune.tasks.understanding.kind import Encoded, Outcomes
from evatune.tasks.understanding.settings import UnderstandingData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("question", "context", "answers")
"""Names of the columns."""
METRICS = {
    "f1": Metric(columns=("f1",), form=".1%"),
    "exact": Metric(columns=("exact",), form=".1%"),
    "loss": Metric(columns=("nll",)),
}
"""`f1`: mean overlap of the words of the given with the expected answer. `exact`: share of the answers that equal an
expected one, but for case, punctuation and articles. `loss`: mean negative log-likelihood of begin and end, in nats,
over the windows of a context."""
NOWHERE = 0
"""Place that stands for "not in this window": the first token."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question."""

    question: str
    """The question."""
    context: str
    """The text that answers it."""
    answers: tuple[str, ...]
    """Answers that count as right; none if the context has no answer."""
    begin: int | None
    """Where the first of them begins in the context, in characters."""


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering:
    """See `evatune.tasks.understanding.kind.Kind`."""

    data: UnderstandingData
    head = "question-answering"
    task_type = "QUESTION_ANS"
    problem_type = None
    targets = ("start_positions", "end_positions")
    too_long = "read in several windows"

    stated = ("begin", "end")
    columns = ", ".join(COLUMNS)

    def converter(self, row: Row, source: str) -> Convert[Asked]:
        """Return what makes a question of each row.

        Raises:
            EvaError: a column is missing.
        """
        for name in COLUMNS:
            if name not in row:
                raise EvaError(
                    f"{source} has no column {name!r}; it has {', '.join(map(str, row))}: say which it is with columns "
                    f"({name}=NAME)."
                )
        return _asked

    def labels(self, examples: Sequence[Asked]) -> tuple[str, ...]:
        """Return the names of the two outputs of each token."""
        return self.stated

    def encode(
        self,
        examples: Sequence[Asked],
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str],
        max_length: int,
        on_disk: bool = False,
    ) -> Encoded:
        """Return windows of question and context, with the places of the answer's first and last token.

        Raises:
            EvaError: the tokenizer does not say where its tokens stand, or a question leaves no room for its context.
        """
        if not tokenizer.is_fast:
            raise EvaError("question-answering needs a fast tokenizer, which says where its tokens stand.")
        rows = empty_list(on_disk=on_disk)
        cut = 0
        for number, example in enumerate(examples):
            asked = tokenizer(example.question, add_special_tokens=False, verbose=False)["input_ids"]
            room = max_length - len(asked) - tokenizer.num_special_tokens_to_add(pair=True)
            if room <= self.data.stride:
                raise EvaError(
                    f"question {example.question!r} leaves {max(room, 0)} of {max_length} tokens for its context, but "
                    f"windows share {self.data.stride}: set a larger data.max_length or a smaller data.stride."
                )
            windows: Any = tokenizer(
                example.question,
                example.context,
                truncation="only_second",
                max_length=max_length,
                stride=self.data.stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            count = len(windows["input_ids"])
            cut += count > 1
            for window in range(count):
                inside = [of == 1 for of in windows.sequence_ids(window)]
                offsets = [
                    place if own else None for place, own in zip(windows["offset_mapping"][window], inside, strict=True)
                ]
                begin, end = _answer_places(example, offsets)
                row = {name: windows[name][window] for name in tokenizer.model_input_names if name in windows}
                targets = {"start_positions": begin, "end_positions": end}
                rows.append(row | targets | {"example": number, "offsets": offsets, "asked": example})
        return Encoded(rows, cut=cut)

    def blank(self, size: int, length: int) -> dict[str, Tensor]:
        """Return places."""
        return {name: torch.zeros(size, dtype=torch.long) for name in self.targets}

    def outputs(self, output: Any) -> Tensor:
        """Return the scores of each token as begin and as end of the answer: (rows, tokens, 2)."""
        return torch.stack([output.start_logits, output.end_logits], dim=-1)

    def metrics(self, labels: Sequence[str]) -> Mapping[str, Metric]:
        """Return the metrics."""
        return METRICS

    def outcomes(
        self, outputs: Sequence[Tensor], encoded: Encoded, examples: Sequence[Asked], labels: Sequence[str]
    ) -> Outcomes:
        """Return `exact`, `f1` and `nll` of each question."""
        best: list[tuple[float, str]] = [(float("-inf"), "")] * len(examples)
        nowhere = [float("inf")] * len(examples)
        losses: list[list[float]] = [[] for _ in examples]
        for scores, row in zip(outputs, encoded.rows, strict=True):
            number, example = row["example"], row["asked"]
            log_probs = scores.log_softmax(dim=0)
            log_prob = log_probs[row["start_positions"], 0] + log_probs[row["end_positions"], 1]
            losses[number].append(-float(log_prob) / 2)
            nowhere[number] = min(nowhere[number], float(scores[NOWHERE].sum()))
            best[number] = max(best[number], best_span(scores, row["offsets"], example.context))
        may_be_none = any(not example.answers for example in examples)
        told: list[dict[str, Any]] = []
        columns: dict[str, list[float]] = {"exact": [], "f1": [], "nll": [sum(one) / len(one) for one in losses]}
        for example, (score, text), none in zip(examples, best, nowhere, strict=True):
            given = "" if may_be_none and none > score else text
            exact, f1 = agreement(given, example.answers)
            columns["exact"].append(exact)
            columns["f1"].append(f1)
            asked = f"{example.context}\n{example.question}"
            told.append({"question": asked, "expected": list(example.answers), "given": given, "right": exact == 1})
        return Outcomes(
            columns=columns,
            told=told,
            counts={"windows": len(encoded), "without_answer": sum(not example.answers for example in examples)},
        )

    def learned(self, row: dict[str, Any], labels: Sequence[str]) -> str:
        """Return the answer as its tokens give it, or that it is not in this window."""
        if row["end_positions"] == NOWHERE:
            return "not in this window" if row["asked"].answers else "no answer"
        return (
            row["asked"]
            .context[row["offsets"][row["start_positions"]][0] : row["offsets"][row["end_positions"]][1]]
            .strip()
        )

    def facts(self, examples: Sequence[Asked], labels: Sequence[str]) -> dict[str, Any]:
        """Return how many questions have no answer."""
        return {"train_without_answer": sum(not example.answers for example in examples)}

    def about(self, labels: Sequence[str]) -> str:
        """Return what is learned."""
        return "places of answers"


def _asked(row: Row) -> Asked | None:
    question, context, answers = map(row.get, COLUMNS)
    if not isinstance(question, str) or not isinstance(context, str):
        raise EvaError("question and context must be strings.")
    known = answers if isinstance(answers, dict) else {}
    texts, begins = known.get("text"), known.get("answer_start")
    if not isinstance(texts, list) or not isinstance(begins, list):
        raise EvaError(f"answers is {answers!r}, but must have the lists 'text' and 'answer_start'.")
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(begin, int) for begin in begins):
        raise EvaError(f"answers is {answers!r}, but 'text' must hold strings and 'answer_start' whole numbers.")
    if not question.strip() or not context.strip():
        return None
    if len(texts) != len(begins):
        raise EvaError(f"answers has {len(texts)} texts, but {len(begins)} places (answer_start).")
    # Some files write an empty text for "no answer".
    given = [(text, begin) for text, begin in zip(texts, begins, strict=True) if text.strip()]
    if not given:
        return Asked(question=question, context=context, answers=(), begin=None)
    text, begin = given[0]
    if context[begin : begin + len(text)] != text:
        raise EvaError(f"the answer {text!r} does not stand at character {begin} of its context.")
    return Asked(question=question, context=context, answers=tuple(text for text, _ in given), begin=begin)


def _answer_places(example: Asked, offsets: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    """Return the places of the first and the last token of the answer, if all of it stands in this window."""
    if example.begin is None:
        return NOWHERE, NOWHERE
    begin, end = example.begin, example.begin + len(example.answers[0])
    inside = [place for place, span in enumerate(offsets) if span and span[0] < end and span[1] > begin]
    whole = inside and offsets[inside[0]][0] <= begin and offsets[inside[-1]][1] >= end  # type: ignore[index]
    return (inside[0], inside[-1]) if whole else (NOWHERE, NOWHERE)
