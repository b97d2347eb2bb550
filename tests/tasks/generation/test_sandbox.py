"""Programs under limits: what passes, what fails and why, and that nothing is left behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from evatune.errors import EvaError
from evatune.tasks.generation import sandbox
from evatune.tasks.generation.sandbox import Limits, Ran, report, run_programs, what_holds


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert sorted([2, 1]) == [1, 2]", ""),
        ("import math, json, collections\nopen('own', 'w').write('x')\nassert open('own').read() == 'x'", ""),
        ("print('much ' * 100000)", ""),
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "ended early"),
        (
            "import os\nfor pipe in range(3, 64):\n    try:\n        os.write(pipe, b'[]')\n    except OSError:\n"
            "        pass\nos._exit(0)",
            "ended early",
        ),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "ended early"),
        ("import ctypes\nctypes.string_at(0)", "ended early"),
        ("import os\nassert 'SECRET_OF_THE_USER' not in os.environ", ""),
        ("input()", "EOFError"),
    ],
)
def test_how_programs_end(program, reason, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_USER", "1")
    (ran,) = run_programs([program])
    assert ran.passed is (not reason)
    assert ran.reason.startswith(reason)


def test_programs_run_side_by_side_and_end_in_time():
    started = time.perf_counter()
    programs = ["while True: pass", "import time\ntime.sleep(60)", "x = 1"]
    ran = run_programs(programs, limits=Limits(seconds=1.5), workers=3)
    assert [found.passed for found in ran] == [False, False, True]
    assert ran[0].reason == ran[1].reason == "time is over"
    assert time.perf_counter() - started < 6


def test_what_is_enforced_is_tested_here():
    holds = what_holds()
    assert holds["can run programs at all"]
    assert holds["time"] and holds["file size"]
    assert holds["memory"] or sys.platform != "linux"
    assert "time" in report()
    for name, holding in holds.items():
        if not holding:
            assert name in report().partition("NOT limited")[2]


def test_a_limit_that_does_not_hold_is_said(monkeypatch):
    holds = {"network": False, "time": True, "can run programs at all": True}
    monkeypatch.setattr(sandbox, "what_holds", lambda: holds)
    assert report() == "programs ran under limits that were tested here: time; NOT limited on this system: network"
    holds["can run programs at all"] = False
    with pytest.raises(EvaError, match="a harmless program does not run under limits on this system"):
        report()


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mark = f"left-behind-{os.getpid()}"
    program = (
        "import ctypes, os, time\nopen('file', 'w').write('x')\n"
        f"if not os.fork():\n    os.setsid()\n    ctypes.CDLL(None).prctl(15, b'{mark[:15]}', 0, 0, 0)\n"
        "    time.sleep(30)\n"
    )
    assert run_programs([program])[0].passed
    assert list(tmp_path.iterdir()) == []
    time.sleep(0.2)
    names = [path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()]
    assert mark[:15] not in names


def test_what_a_program_has_started_does_not_answer_for_it():
    both = "import os\npid = os.fork()\nif pid:\n    os.waitpid(pid, 0)\n"
    assert run_programs([both, both + "else:\n    raise ValueError\n"]) == [
        Ran(passed=True, reason=""),
        Ran(passed=True, reason=""),
    ]


def test_where_processes_cannot_be_limited_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(EvaError, match="only run where processes can be limited"):
        run_programs(["x = 1"])
