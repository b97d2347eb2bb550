"""What a comparison says in a few sentences: which method is best, by how much, and how sure."""

from __future__ import annotations

from evatune.compare.differences import Compared, of_task
from evatune.compare.standing import Standing
from evatune.errors import EvaError
from evatune.exhibits.view import View

_ENDS = {
    "better": "and better than {} beyond chance",
    "worse": "and worse than {} beyond chance",  # where examples shared with the reference are few
    "not told apart": "but cannot be told apart from {}",
}
"""What is said of the best method, by the verdict of its comparison with the reference."""


def headline(view: View) -> tuple[str, str]:
    """Return a sentence on the best method of a task, and its numbers; empty texts if no method has a score."""
    board, task = view.board_so_far, view.one_task
    rows = [row for method in board.methods if (row := board.at(method, task)) and row.mean is not None]
    if not rows:
        return "", ""
    rows = [row for row in rows if len(row.scores) >= row.n_seeds] or rows  # the best of few seeds may be luck
    best = max(rows, key=lambda row: board.sign(task) * (row.mean or 0.0))
    title = f"{task}: {best.method} is best of {len(rows)}"
    numbers = f"`{best.method}` has {_score(best)} {best.metric}"
    try:
        name = board.reference(view.against)
        compared = of_task(view.differences, task)
    except EvaError:
        return title, f"{numbers}. There is no method to compare with."
    theirs = board.at(name, task)
    if theirs is None or theirs.mean is None:
        return title, f"{numbers}; {name} has no score to compare with."
    counts = f" {_count(len(compared), 'method')} compared with {name}: {_listed(compared)}" if compared else ""
    if best.method == name:
        return title, f"{numbers}.{counts}"
    numbers += f", `{name}` {_score(theirs)}"
    ours = next((one for one in compared if one.method == best.method), None)
    if ours is None:
        return title, f"{numbers}. Their examples cannot be paired."
    numbers += f": better by {_difference(ours)}"
    if ours.verdict == "one seed":
        title += ", of one seed, which is too few to tell"
        return title, f"{numbers} over examples alone. Another seed may say the opposite."
    return f"{title}, {_ENDS[ours.verdict].format(name)}", f"{numbers}, p = {ours.p:.2g} after Holm.{counts}"


def _score(row: Standing) -> str:
    spread = f" ± {row.deviation:.4f}" if row.deviation is not None else ""
    return f"{row.mean:.4f}{spread}"


def _difference(compared: Compared) -> str:
    """Return a difference with its interval."""
    found = compared.difference.estimate
    low, high = found.interval or (found.value, found.value)
    return f"{found.value:+.4f}, 95% interval {low:+.4f} to {high:+.4f}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s were' if n != 1 else ' was'}"


def _listed(compared: list[Compared]) -> str:
    """Return which methods differ beyond chance, in words."""
    parts = []
    for verdict in ("better", "worse"):
        names = ", ".join(f"`{one.method}`" for one in compared if one.verdict == verdict)
        parts += [f"{verdict} beyond chance {'are' if ',' in names else 'is'} {names}"] if names else []
    return "; ".join(parts) + "." if parts else "none differs beyond chance."
