"""What processes that were started together know of each other, and what a single one need not care for."""

from __future__ import annotations

import sys

import pytest

from evatune import launch
from evatune.cli.main import main


def test_one_process_does_everything_itself():
    assert (launch.n_launched(), launch.launched_as(), launch.n_processes(), launch.number()) == (1, 0, 1, 0)
    assert launch.is_first() and launch.says_first("anything") and not launch.another_ended()
    assert launch.any_of(True) and not launch.any_of(False)
    launch.wait()
    with launch.together(), launch.only_first_prints():
        pass


@pytest.fixture
def second_of_two(monkeypatch):
    """The environment of process 1, whose launcher cannot be reached."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)


def test_the_others_print_nothing_but_errors(second_of_two, capsys):
    assert (launch.n_launched(), launch.launched_as()) == (2, 1)
    with launch.only_first_prints():
        print("nothing")
        print("of this", file=sys.stderr)
    assert capsys.readouterr() == ("", "")
    assert launch.says_first("alone") and not launch.another_ended()


def test_commands_that_need_one_process_run_in_the_first_alone(second_of_two, tmp_path):
    assert main(["plan", str(tmp_path / "nothing")]) == 0
    assert main(["methods"]) == 0


def test_the_first_one_then_works_alone(second_of_two, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert main(["methods"]) == 0
    assert "eva" in capsys.readouterr().out
    assert launch.n_launched() == 1


def test_more_processes_than_accelerators_are_refused(second_of_two, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with (
        pytest.raises(
            launch.EvaError, match="process 1 has no GPU of its own, since this machine has 1; start as many"
        ),
        launch.together(),
    ):
        raise AssertionError("not reached")
