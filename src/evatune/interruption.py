"""Ctrl-C that does not destroy what was done: one press may be noted instead of raising `KeyboardInterrupt`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts(*, held: int = 1, say: str = "") -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed, while one press does not raise `KeyboardInterrupt`.

    Signals belong to the main thread; in others nothing changes and the function always returns False.

    Args:
        held: the number of the press that is only noted; the others raise as usual. 1 lets a step end before the caller
            reacts; 2 raises at once, and keeps a second press from destroying what is saved because of the first.
        say: printed on standard error at that press.
    """
    n_pressed = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal n_pressed
        n_pressed += 1
        if n_pressed != held:
            raise KeyboardInterrupt
        if say:
            print(say, file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: n_pressed > 0
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
