"""Run the tests of evatune on a device, for some time, and read what they have said until then.

A part of `benchmarks/accelerator.py`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ("tests/pca", "tests/initialization", "tests/adapters", "tests/activations")
MOST_PROCESSES = 16
"""Tests run in half as many processes as the machine has cores, and as this."""
LAST_WORDS = 20.0
"""How many seconds of their time tests have to tell what has failed when they are ended."""


def run_tests(device: str, *, seconds: float, output: Path) -> str:
    """Run the tests on the device, and return how they ended.

    Args:
        device: as `EVATUNE_TEST_DEVICE` names it.
        seconds: after these, pytest is asked to say what has failed until then, and at last it is ended.
        output: the file for all that pytest says.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-rfE",
        "--tb=short",
        "--continue-on-collection-errors",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
    ]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"EVATUNE_TEST_DEVICE": device, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    n_workers = min(os.cpu_count() or 1, MOST_PROCESSES) // 2
    if is_spread := n_workers > 1 and find_spec("xdist") is not None:
        command += ["-n", str(n_workers)]
    until = time.perf_counter() + seconds
    # Folders of its own, so that none of earlier runs are cleaned up in this time.
    with output.open("w") as file, TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command.append(f"--basetemp={folder}/tests")
        running = subprocess.Popen(
            [*command, *TESTS], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            running.wait(timeout=max(seconds - LAST_WORDS, seconds / 2))
            return (output.read_text().strip().splitlines() or [f"exit status {running.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            while running.poll() is None and time.perf_counter() < until:
                running.send_signal(signal.SIGINT)  # pytest then tells why; a measurement takes this for itself
                with suppress(subprocess.TimeoutExpired):
                    running.wait(timeout=12 if is_spread else 4)  # its processes have 10 s to end
            return f"not within {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def read_tests(output: Path, *, ended: str) -> dict[str, Any]:
    """Return what pytest has said: how it ended, how far it came and what had failed until then."""
    said = output.read_text(errors="replace") if output.exists() else ""
    failed = [line for line in said.splitlines() if re.search(r"\b(FAILED|ERROR)\b", line)]
    return {
        "ended": ended,
        "passed": len(re.findall(r"\bPASSED\b", said)),
        "failed": failed[:200],
        "progress": re.findall(r"\[ *\d+%\]", said)[-1:],
        "output": said[-4000:],
    }
