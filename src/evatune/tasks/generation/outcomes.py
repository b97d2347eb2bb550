"""From the likelihoods and the written answers of examples to scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evatune.tasks.generation.answers import names_of_choices
from evatune.tasks.generation.example import Example
from evatune.tasks.generation.likelihood import Likelihood
from evatune.tasks.generation.sandbox import report
from evatune.tasks.scores import Metric, Scores

_LOSS = {
    "loss": Metric(columns=("nll", "tokens"), statistic="ratio"),
    "exact": Metric(columns=("exact",), form=".1%"),
}
"""`loss`: mean negative log-likelihood of a completion token, in nats. `exact`: share of the completions that greedy
decoding gives token for token, end token included."""


class Outcomes:
    """What is known of held-out examples, and the metrics that follow from it.

    Args:
        examples: the held-out examples.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._metrics: dict[str, Metric] = {}
        self._outcomes: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {"examples": len(examples)}
        self._details = [_described(example) for example in examples]
        self._notes: list[str] = []

    def add_likelihoods(self, found: Sequence[Likelihood]) -> None:
        """Add the loss of all completions, and the accuracy of the questions among them."""
        self._metrics |= _LOSS
        self._outcomes |= {
            "nll": [likelihood.nll for likelihood in found],
            "tokens": [float(likelihood.tokens) for likelihood in found],
            "exact": [float(likelihood.exact) for likelihood in found],
        }
        self._counts["tokens"] = sum(likelihood.tokens for likelihood in found)
        self._counts["shortened"] = sum(likelihood.cut for likelihood in found)
        right: dict[int, float] = {}
        for index, (example, likelihood) in enumerate(zip(self._examples, found, strict=True)):
            self._details[index]["loss"] = likelihood.nll / max(1, likelihood.tokens)
            if likelihood.choices:
                names, picked = names_of_choices(example.choices), likelihood.choices.index(max(likelihood.choices))
                right[index] = float(picked == example.answer)
                self._details[index] |= {
                    "choices": names,
                    "likelihoods": list(likelihood.choices),
                    "likeliest": names[picked],
                    "given": names[picked],
                    "right": picked == example.answer,
                }
        self._add("accuracy", "right", right)
        self._counts["questions"] = len(right)

    def add_answers(self, found: Mapping[int, Mapping[str, Any]], *, n_shortened: int) -> None:
        """Add the share of written answers that are right, and pass@k of programs.

        Of an example, `given` and `right` are of the first answer; `written` has all of them.

        Args:
            found: `texts` and `verdicts` by the place of the example.
            n_shortened: prompts that lost their beginning.
        """
        shares: dict[int, float] = {}
        programs: dict[int, list[bool]] = {}
        for index, answers in sorted(found.items()):
            right = [verdict["right"] for verdict in answers["verdicts"]]
            if self._examples[index].program:
                programs[index] = right
            else:
                shares[index] = sum(right) / len(right)
            self._details[index] |= {
                "given": answers["verdicts"][0]["given"],
                "right": right[0],
                "written": [
                    {"text": text} | verdict
                    for text, verdict in zip(answers["texts"], answers["verdicts"], strict=True)
                ],
            }
        self._add("generated", "written", shares)
        for k in _sizes(programs):
            self._add(f"pass@{k}", f"passed@{k}", {index: pass_at(k, right) for index, right in programs.items()})
        self._notes += [report()] if programs else []
        verdicts = [verdict for answers in found.values() for verdict in answers["verdicts"]]
        self._counts["answers"] = len(verdicts)
        self._counts["shortened_prompts"] = n_shortened
        self._counts["unparsed"] = sum(verdict["given"] is None for verdict in verdicts)

    def scores(self, *, dropped: int, seconds: float) -> Scores:
        """Return the scores; the first metric that was added is the headline."""
        return Scores(
            headline=next(iter(self._metrics)),
            metrics=self._metrics,
            outcomes=self._outcomes,
            counts=self._counts | {"dropped": dropped},
            seconds=seconds,
            examples=self._details,
            notes=self._notes,
        )

    def _add(self, metric: str, column: str, found: Mapping[int, float]) -> None:
        """Add a metric over the examples that have it, and with several tasks their mean and each of them."""
        self._outcomes[column] = list(found.values())
        if not found:
            return
        self._metrics[metric] = Metric(columns=(column,), form=".1%")
        tasks = sorted({self._examples[index].task for index in found})
        if len(tasks) < 2:
            return
        self._outcomes[f"{column}/task"] = [float(tasks.index(self._examples[index].task)) for index in found]
        self._metrics[f"{metric}/mean"] = Metric(
            columns=(column, f"{column}/task"), statistic="mean_of_groups", form=".1%"
        )
        for task in tasks:
            own = [value for index, value in found.items() if self._examples[index].task == task]
            self._outcomes[f"{column}/{task}"] = own
            self._metrics[f"{metric}/{task}"] = Metric(columns=(f"{column}/{task}",), form=".1%")


def pass_at(k: int, right: Sequence[bool]) -> float:
    """Return the probability that one of k programs drawn from those written is right, without bias.

    Chen et al., 2021, Evaluating Large Language Models Trained on Code, equation 1.
    """
    return 1.0 - math.comb(len(right) - sum(right), k) / math.comb(len(right), k)


def _sizes(programs: Mapping[int, Sequence[bool]]) -> list[int]:
    """Return the k of pass@k: 1, 10 and 100 as far as there are so many answers, and how many there are."""
    n = min(map(len, programs.values()), default=0)
    return sorted({k for k in (1, 10, 100, n) if 0 < k <= n})


def _described(example: Example) -> dict[str, Any]:
    """Return what was asked and what would be right."""
    detail: dict[str, Any] = {"task": example.task} if example.task else {}
    expected = example.expected or example.completion
    if example.answer is not None:
        expected = names_of_choices(example.choices)[example.answer]
    return detail | {"question": example.asked, "expected": expected}
