from __future__ import annotations

import re

from evatune.report.sorting import SCRIPT


def test_what_a_column_is_sorted_by():
    pattern = re.search(r"const number = /(.*)/i\.exec", SCRIPT)[1]  # what Python and JavaScript read alike

    def number(text: str) -> str | None:
        found = re.match(pattern, text, re.IGNORECASE)
        return found and found[0]

    assert number("4.2e-05") == "4.2e-05" and number("−1,234.5") == "−1,234.5"
    assert number("0.82 ± 0.02") == "0.82" and number("12%") == "12"
    assert number("2026-11-27T08:39:54+00:00") is None and number("3 of 3") == "3"  # dates are sorted as text
