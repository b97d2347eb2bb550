"""The page of right and wrong answers."""

from __future__ import annotations

from evatune.report.outcomes import N_SHOWN, write_outcomes_page

SCORES = [["accuracy", "50.0%", "10.0% to 90.0%"]]


def example(number: int, *, right: bool, **more) -> dict:
    return {
        "question": f"{number} < 2?",
        "expected": "true",
        "given": "true" if right else "false",
        "right": right,
    } | more


def page(tmp_path, examples) -> str:
    return write_outcomes_page(tmp_path / "page.html", title="Answers", scores=SCORES, examples=examples).read_text()


def test_right_and_wrong_examples_are_shown_apart(tmp_path):
    written = [{"text": "true, surely", "given": "true", "right": True, "reason": ""}]
    html = page(tmp_path, [example(1, right=True, task="boolq", written=written), example(3, right=False)])
    wrong, _, right = html.partition("Right: 1 of 2")
    assert "Wrong: 1 of 2" in wrong
    assert "3 &lt; 2?" in wrong and "given     false" in wrong
    assert "[boolq]\n1 &lt; 2?" in right and "true, surely" in right
    assert "10.0% to 90.0%" in html


def test_long_lists_and_texts_are_cut(tmp_path):
    html = page(tmp_path, [example(number, right=False) for number in range(N_SHOWN + 5)])
    assert f"The first {N_SHOWN} of them:" in html
    assert html.count("given     false") == N_SHOWN
    html = page(tmp_path, [example(1, right=False, given=None, expected="x" * 5000)])
    assert "(5,000 characters)" in html
    assert "nothing that can be read" in html


def test_examples_that_are_neither_right_nor_wrong(tmp_path):
    assert "There are none." in page(tmp_path, [{"question": "a", "expected": "b"}])


def test_of_numbers_those_are_shown_that_are_farthest_off(tmp_path):
    rows = [{"question": f"pair {number}", "expected": 2.0, "given": 2.0 + number} for number in (1, -3, 2)]
    html = page(tmp_path, rows)
    assert "Wrong" not in html and "Right" not in html
    assert html.index("pair -3") < html.index("pair 2") < html.index("pair 1")
