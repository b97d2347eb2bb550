"""Put small faults into the sources, one at a time, and count how many the tests notice.

Command, from the root of the repository (`make mutants`):

    python tests/mutants/run.py [--only WORD] [--jobs N]

`faults.py` and `faults_of_runs.py` beside this file list the faults: in a file, one piece of text that is replaced by
another, and the tests that should notice. A text that is not found exactly once is an error, so that the list keeps up
with the sources. Each fault goes into a copy of the sources; the working tree stays as it is. Ends with exit code 1 if
fewer than 90% are noticed, if one that is not has no reason, or if one is noticed that has a reason not to be.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENOUGH = 0.9
PATIENCE = 240
"""Seconds after which a fault counts as noticed, since the tests hang."""


@dataclass(frozen=True)
class Fault:
    """One change of the sources."""

    file: str
    """Below src/evatune."""
    old: str
    new: str
    tests: tuple[str, ...]
    """Arguments of pytest."""
    reason: str = ""
    """Why no test notices it."""

    @property
    def title(self) -> str:
        """The change in one line."""
        return f"{self.file}: {' '.join(self.old.split())} -> {' '.join(self.new.split())}"


def read_faults() -> list[Fault]:
    """Return the faults of the list.

    Raises:
        SystemExit: a text is not found exactly once, or changes nothing.
    """
    faults = []
    for path in sorted(Path(__file__).parent.glob("faults*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        faults += [
            Fault(file, old, new, tuple(tests), *reason)
            for file, (tests, changes) in module.FAULTS.items()
            for old, new, *reason in changes
        ]
    broken = []
    for fault in faults:
        path = ROOT / "src" / "evatune" / fault.file
        count = path.read_text(encoding="utf-8").count(fault.old) if path.is_file() else 0
        if count != 1 or fault.old == fault.new:
            broken.append(f"found {count} times: {fault.title}")
        broken += [
            f"no tests {name}: {fault.title}" for name in fault.tests if not (ROOT / name.split("::")[0]).exists()
        ]
    if broken:
        sys.exit("the list of faults does not fit the sources:\n" + "\n".join(broken))
    return faults


def is_noticed(fault: Fault) -> tuple[Fault, str, float]:
    """Run the tests on sources with the fault, in this process, which is thrown away; return what noticed it."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src", Path(folder) / "src", ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(folder) / "src" / "evatune" / fault.file
        path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        sys.path.insert(0, str(Path(folder) / "src"))
        os.environ["PYTHONPATH"] = str(Path(folder) / "src")  # for tests that start processes
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(PATIENCE)
        import pytest

        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *fault.tests])
        except TimeoutError:
            return fault, "they hang", time.perf_counter() - started
        signal.alarm(0)
    failed = [line for line in output.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))]
    noticed = "" if code == 0 else (failed or [output.getvalue()[-300:]])[0]
    return fault, noticed, time.perf_counter() - started


def give_up(signum: int, frame: object) -> None:
    raise TimeoutError


def warm_up() -> None:
    """Import what is slow to import and not ours; processes that are forked from this one have it then."""
    os.chdir(ROOT)
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "src"]
    import peft
    import pytest
    import torch
    import transformers

    torch.set_num_threads(1)
    assert "evatune" not in sys.modules, (peft, pytest, transformers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="only faults whose line has this word")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time")
    args = parser.parse_args()
    faults = [fault for fault in read_faults() if args.only in fault.title]
    warm_up()
    missed, stale = [], []
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        for number, (fault, noticed, seconds) in enumerate(pool.imap(is_noticed, faults, chunksize=1), start=1):
            if not noticed:
                missed.append(fault)
            elif fault.reason:
                stale.append(fault)
            mark = "noticed" if noticed else "MISSED "
            print(f"{number:>4}/{len(faults)}  {mark} {seconds:5.1f} s  {fault.title}", flush=True)
            if noticed:
                print(f"{'':>26}{noticed[:140]}")
    for fault in missed:
        print(f"missed   {fault.title}\n         {fault.reason or 'NO REASON GIVEN'}")
    for fault in stale:
        print(f"noticed, though the list says it cannot be: {fault.title}")
    n_caught = len(faults) - len(missed)
    print(f"\n{n_caught} of {len(faults)} faults noticed, {n_caught / max(len(faults), 1):.0%}")
    good = n_caught >= ENOUGH * len(faults) and not stale and all(fault.reason for fault in missed)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
