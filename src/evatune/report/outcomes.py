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
        examples: `question`, `expected`, `given` and `right` of each, see `evatune.tasks.scores.Scores.examples`.
        lead: what stands under the title.
    """
    told = [example for example in examples if "right" in example]
    wrong, right = ([example for example in told if bool(example["right"]) is kind] for kind in (False, True))
    sections = [
        Section(title="Scores", content=[Table(headers=("metric", "score", "95% interval"), rows=scores)]),
        *(
            Section(
                title=f"{name.capitalize()}: {len(found):,} of {len(told):,}",
                content=[_count(found), *(Verbatim(text=_shown(example)) for example in found[:N_SHOWN])],
            )
            for name, found in (("wrong", wrong), ("right", right))
        ),
    ]
    return write_page(path, title=title, sections=sections, lead=lead)


def _count(found: Sequence[Any]) -> str:
    if not found:
        return "There are none. Only questions with choices and written answers are right or wrong."
    return f"The first {N_SHOWN} of them:" if len(found) > N_SHOWN else "All of them:"


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
