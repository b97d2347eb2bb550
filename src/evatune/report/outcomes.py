"""One page with the scores of a model, and with examples that it answered right and wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evatune.report.page import Section, Table, Verbatim, write_page

N_SHOWN = 30
"""Examples of each kind on a page."""
_LONGEST = 2000
"""Characters of a text that are shown."""


def write_outcomes_page(
    path: str | Path,
    *,
    title: str,
    scores: Sequence[Sequence[str]],
    examples: Sequence[Mapping[str, Any]],
    lead: str = "",
) -> Path:
    """Write what a model answered as one self-contained HTML file.

    Args:
        path: the file.
        title: title of the page.
        scores: name, value and interval of each metric.
        examples: `question`, `expected`, `given` and `right` of each, see `evatune.tasks.scores.Scores.examples`. Of
            numbers, which have no `right`, those are shown that are farthest off.
        lead: what stands under the title.
    """
    told = [example for example in examples if "right" in example]
    wrong, right = ([example for example in told if bool(example["right"]) is kind] for kind in (False, True))
    off = sorted((example for example in examples if _is_number(example)), key=_distance, reverse=True)
    groups = [
        (f"{name}: {len(found):,} of {len(told):,}", found) for name, found in (("Wrong", wrong), ("Right", right))
    ]
    if off:
        groups = [*(groups if told else []), ("Farthest off", off)]
    sections = [Section(title="Scores", content=[Table(headers=("metric", "score", "95% interval"), rows=scores)])]
    sections += [
        Section(title=name, content=[_count(found), *(Verbatim(text=_shown(example)) for example in found[:N_SHOWN])])
        for name, found in groups
    ]
    return write_page(path, title=title, sections=sections, lead=lead)


def _count(found: Sequence[Any]) -> str:
    if not found:
        return "There are none. Only questions with choices and written answers are right or wrong."
    return f"The first {N_SHOWN} of them:" if len(found) > N_SHOWN else "All of them:"


def _is_number(example: Mapping[str, Any]) -> bool:
    """Return whether an example is about a number, which is near or far and not right or wrong."""
    return "right" not in example and isinstance(example.get("expected"), float)


def _distance(example: Mapping[str, Any]) -> float:
    return abs(example["expected"] - example["given"])


def _shown(example: Mapping[str, Any]) -> str:
    """Return one example as text."""
    given = example.get("given")
    lines = [f"[{example['task']}]"] if example.get("task") else []
    lines += [_cut(example["question"]), "", f"expected  {_cut(example['expected'])}"]
    lines += [f"given     {_cut('nothing that can be read' if given is None else given)}"]
    for answer in example.get("written", ()):
        mark = "right" if answer["right"] else "wrong"
        reason = f" ({answer['reason']})" if answer.get("reason") else ""
        lines += ["", f"── written, {mark}{reason}", _cut(answer["text"])]
    return "\n".join(lines)


def _cut(text: Any) -> str:
    text = str(text).strip()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"
