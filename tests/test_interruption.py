"""Ctrl-C that is noted instead of raised."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from evatune.interruption import held_interrupts


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_interrupt_is_held_and_the_second_is_not():
    before = signal.getsignal(signal.SIGINT)
    with held_interrupts() as interrupted:
        assert not interrupted()
        interrupt()
        assert interrupted()
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    found = []

    def act():
        with held_interrupts() as interrupted:
            found.extend([interrupted(), signal.getsignal(signal.SIGINT) is before])

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert found == [False, True]


def test_later_presses_can_be_those_that_are_held(capsys):
    before = signal.getsignal(signal.SIGINT)
    with held_interrupts(held=(2, 3), say="wait") as interrupted:
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            interrupt()
        assert interrupted() and not capsys.readouterr().err
        interrupt()
        assert capsys.readouterr().err == "wait\n"
        interrupt()
        assert not capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_block_inside_another_counts_and_holds_as_the_outer_one():
    with held_interrupts(held=(2,)) as outer:
        with held_interrupts(held=(1,)) as inner, pytest.raises(KeyboardInterrupt, match=r"^$"):
            interrupt()
        assert inner()
        interrupt()  # between the two, as when a result is saved because of the first press
        with held_interrupts() as again:
            assert again() and outer()
