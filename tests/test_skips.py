"""A run in which another number of tests is skipped than stated fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(("stated", "code"), [(0, 0), (1, 1)])
def test_the_number_of_skipped_tests_is_stated(stated, code):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--skips", str(stated)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [*command, str(TESTS / "test_hardware.py")], cwd=TESTS.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert f"0 tests were skipped, {stated} may be" in done.stdout
