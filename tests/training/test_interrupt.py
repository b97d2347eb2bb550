"""Ctrl-C while training: what is caught, and what is given back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from evatune.training.callbacks import InterruptCallback


def mine(number, frame):
    """A handler of the caller's."""


@pytest.fixture(autouse=True)
def handler_of_the_caller():
    before = signal.signal(signal.SIGINT, mine)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_the_handler_of_the_caller_comes_back(error):
    interrupt = InterruptCallback()
    try:
        with interrupt.listening():
            assert signal.getsignal(signal.SIGINT) is not mine
            if error:
                raise error
    except ValueError:
        pass
    assert signal.getsignal(signal.SIGINT) is mine


def test_the_first_waits_for_the_step_and_the_second_does_not():
    interrupt = InterruptCallback()
    with interrupt.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.interrupted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_leaves_the_handler_alone():
    seen = []

    def listen():
        with InterruptCallback().listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [mine]
