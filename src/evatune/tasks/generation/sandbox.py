"""Programs that a model wrote, each run in a process of its own under limits.

A program passes if it runs to its end without an exception. It gets a temporary folder, an empty environment, and
limits on time, memory, processes and file size. Where the system allows it, it has no network and can write in its
folder only.
`what_holds` tries what a program shall not do, so that a report says what was enforced, not what was asked for.

This protects from mistakes and from common mischief. It is no guarantee against an attack on the operating system.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from evatune.errors import EvaError

_SCRIPT = Path(__file__).with_name("confined.py")
_MEGABYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    """Time on the clock; time on the processor is one second more."""
    memory: int = 1024
    """Address space in MiB."""
    processes: int = 16
    """Processes and threads."""
    file_size: int = 16
    """Files that it writes, in MiB."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a program ended."""

    passed: bool
    """Whether it came to its end."""
    reason: str
    """Why not: the exception, `time is over`, or `ended early`."""


def run_programs(programs: Sequence[str], *, limits: Limits | None = None, workers: int | None = None) -> list[Ran]:
    """Run programs side by side.

    Args:
        programs: Python programs.
        limits: what each may use.
        workers: how many run at a time; by default one for each processor core.

    Returns:
        How each ended.

    Raises:
        EvaError: this system cannot limit processes.
    """
    if os.name != "posix":
        raise EvaError("programs of a model are only run where processes can be limited (Linux or macOS).")
    limits = limits or Limits()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda program: _run(program, limits), programs))


def _run(program: str, limits: Limits) -> Ran:
    reading, writing = os.pipe()
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="evatune-program-", ignore_cleanup_errors=True) as folder:
        order = {
            "program": program,
            "folder": folder,
            "report": writing,
            "secret": secret,
            "seconds": limits.seconds,
            "memory_bytes": limits.memory * _MEGABYTE,
            "file_bytes": limits.file_size * _MEGABYTE,
            "processes": limits.processes,
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        in_time = True
        try:
            process.communicate(json.dumps(order).encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with os.fdopen(reading, "rb") as report:
            os.set_blocking(report.fileno(), False)  # a child that lives on must not be waited for
            content = report.read() or b""
    return _ended(content, secret) if in_time else Ran(passed=False, reason="time is over")


def _ended(content: bytes, secret: str) -> Ran:
    """Return how a program ended by what was reported; what it may have reported itself lacks the secret."""
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("secret") != secret:
        return Ran(passed=False, reason="ended early")
    return Ran(passed=not found["reason"], reason=found["reason"])


_TRIALS = {
    "memory": "held = bytearray(1 << 30)",
    "processes": "import os, time\nfor _ in range(64):\n    if not os.fork():\n        time.sleep(2); os._exit(0)",
    "file size": "with open('large', 'wb') as file:\n    file.write(b' ' * (4 << 20))\n    file.flush()",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)",
    "files outside its folder": "open({outside!r}, 'w').close()",
    "time": "while True: pass",
}
"""Programs that pass only where a limit is not enforced; `{port}` and `{outside!r}` are filled in."""


@cache
def what_holds() -> dict[str, bool]:
    """Return for each limit whether it holds on this system, found by programs that try to break it.

    Cost: about two seconds, once.
    """
    import socket

    limits = Limits(seconds=3.0, memory=512, processes=16, file_size=1)
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        port, outside = server.getsockname()[1], str(Path(folder) / "outside")
        programs = {name: program.format(port=port, outside=outside) for name, program in _TRIALS.items()}
        brief = replace(limits, seconds=1.0)
        found = {
            name: not _run(program, brief if name == "time" else limits).passed for name, program in programs.items()
        }
        found["can run programs at all"] = _run("import math", limits).passed
    return found


def report() -> str:
    """Return what is enforced on this system, as a sentence.

    Raises:
        EvaError: even a harmless program does not run.
    """
    holds = dict(what_holds())
    if not holds.pop("can run programs at all"):
        raise EvaError("a harmless program does not run under limits on this system, so no program can be judged.")
    kept, open_ = ([name for name, holding in holds.items() if holding is wanted] for wanted in (True, False))
    more = f"; NOT limited on this system: {', '.join(open_)}" if open_ else ""
    return f"programs ran under limits that were tested here: {', '.join(kept)}{more}"
