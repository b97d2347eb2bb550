"""The errors and warnings that evatune raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EvaError(ValueError):
    """Input that evatune cannot use.

    The message is one sentence that names the thing, the value that was received and the way out.
    Every error that a user can cause is of this type; the command line prints it without a traceback.
    """


class EvaWarning(UserWarning):
    """evatune did something else than what was asked, or a result may be inaccurate."""


def near_misses(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return `` (did you mean 'a', 'b'?)`` for the known names nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=limit, cutoff=0.5)
    return f" (did you mean {', '.join(repr(match) for match in close)}?)" if close else ""
