"""Ctrl-C that does not destroy what was done: some presses may be noted instead of raising `KeyboardInterrupt`.

SIGTERM can be made to do the same.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType

KEEPS = (2, 3)
"""Presses that are only noted where the first one ends the work: they cannot destroy what is saved because of it."""
ENDS_STEP = (1,)
"""The press that is only noted where a step ends before the work does."""
ENDS_TOGETHER = (1, 2, 3)
"""Presses that are only noted in several processes: a launcher repeats the user's, and no process may leave alone."""


class _Handler:
    """Counts presses and raises `KeyboardInterrupt` at those that are not held."""

    def __init__(self, held: Collection[int], say: str) -> None:
        self.held, self.say, self.n_pressed = held, say, 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.n_pressed += 1
        if self.n_pressed not in self.held:
            raise KeyboardInterrupt
        if self.say and self.n_pressed == min(self.held):
            print(self.say, file=sys.stderr)

    def is_pressed(self) -> bool:
        return self.n_pressed > 0


def interrupt(number: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C does; a handler for SIGTERM, by which a scheduler asks a run to save its work and end."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # a shell lets what it runs in the background ignore Ctrl-C
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


@contextmanager
def held_interrupts(*, held: Collection[int] = ENDS_STEP, say: str = "") -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed, while some presses do not raise `KeyboardInterrupt`.

    Signals belong to the main thread; in others nothing changes and the function always returns False. Inside such a
    block another one changes nothing: presses are counted and held as the outer one says.

    Args:
        held: the numbers of the presses that are only noted; the others raise as usual.
        say: printed on standard error at the first of these presses.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)
    if isinstance(before, _Handler):
        yield before.is_pressed
        return
    handler = _Handler(held, say)
    signal.signal(signal.SIGINT, handler)
    try:
        yield handler.is_pressed
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
