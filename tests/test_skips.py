"""A run in which another number of tests is skipped than stated fails."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(("stated", "code"), [(0, 0), (1, 1)])
def test_the_number_of_skipped_tests_is_stated(monkeypatch, capsys, stated, code):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    wanted = ["-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent), "--skips", str(stated)]
    assert pytest.main([*wanted, str(TESTS / "test_hardware.py")]) == code
    assert f"0 tests were skipped, {stated} may be" in capsys.readouterr().out
