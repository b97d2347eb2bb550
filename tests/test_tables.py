from __future__ import annotations

import doctest
import math

import pytest

from evatune import tables
from evatune.errors import EvaError
from evatune.tables import Marked, Table, bar, latex_table, linked, markdown_table, number, span, text_table


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(tables)
    assert result.attempted > 0
    assert result.failed == 0


def test_numbers_go_right_and_words_left_and_columns_line_up():
    lines = text_table(["method", "parameters", "loss"], [["EVA", 1234567, 0.123456], ["LoRA", 12, None]]).splitlines()
    assert lines[0].split() == ["method", "parameters", "loss"]
    assert lines[2] == "EVA      1,234,567  0.1235"
    assert lines[3] == "LoRA            12       –"
    assert [len(part) for part in lines[1].split("  ")] == [6, 10, 6]


def test_a_long_last_column_goes_on_in_further_lines():
    table = text_table(["name", "idea"], [["eva", "one two three four five six seven"], ["lora", ""]], width=26)
    assert table.splitlines()[2:] == ["eva   one two three four", "      five six seven", "lora"]
    assert max(map(len, text_table(["name", "idea"], [["eva", "one " * 30]], width=3).splitlines())) <= 6 + 20


@pytest.mark.parametrize(
    ("value", "shown"),
    [(True, "yes"), (None, "–"), (12345, "12,345"), (math.nan, "nan"), (-math.inf, "-inf"), (1e6, "1,000,000")],
)
def test_cells(value, shown):
    assert text_table(["x"], [[value]]).splitlines()[-1] == shown


def test_a_column_with_a_word_in_it_goes_left_and_no_line_ends_in_blanks():
    lines = text_table(["a", "note"], [[1, "7"], [22, "seven"]]).splitlines()
    assert lines == [" a  note", "──  ─────", " 1  7", "22  seven"]


def test_a_line_break_in_a_cell_does_not_break_the_table():
    assert text_table(["a", "b"], [["one\ntwo", 1]]).splitlines()[-1] == "one two  1"


def test_markdown_escapes_bars_and_marks_columns_of_numbers():
    lines = markdown_table(["a|b", "n"], [["x|y", 3]]).splitlines()
    assert lines == [r"| a\|b |   n |", r"| ---- | --: |", r"| x\|y |   3 |"]


def test_a_table_without_rows_keeps_its_header():
    assert text_table(["a", "b"], []) == "a  b\n─  ─"
    assert markdown_table(["a"], []).splitlines() == ["| a   |", "| --- |"]


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(EvaError, match="row 1 of the table has 1 cells, the header has 2"):
        text_table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(EvaError, match="one letter a column"):
        text_table(["a", "b"], [[1, 2]], align="rc")
    with pytest.raises(EvaError, match="at least one column"):
        text_table([], [])


@pytest.mark.parametrize(
    ("value", "drawn"), [(0, ""), (-1, ""), (math.nan, ""), (math.inf, ""), (10, "████"), (99, "████"), (5, "██")]
)
def test_bars(value, drawn):
    assert bar(value, 10, width=4) == drawn


def test_a_bar_of_nothing_is_empty():
    assert bar(1, 0) == ""


def test_a_table_for_a_narrow_terminal_states_columns_of_one_value_below():
    headers = ["task", "method", "better than lora by", "pairs"]
    rows = [["digits", "eva ρ=1", number(0.25, "+.2f"), 1795], ["digits", "full", number(-0.5, "+.2f"), 1795]]
    table = Table(headers=headers, rows=rows, caption="Means.")
    assert table.text() == table.text(width=80)
    assert table.text(width=24).splitlines() == [
        "         better",
        "           than",
        "           lora",
        "method       by  pairs",
        "───────  ──────  ─────",
        "eva ρ=1   +0.25  1,795",
        "full      -0.50  1,795",
        "All rows: task digits.",
        "Means.",
    ]
    assert "All rows" not in Table(headers=headers, rows=rows[:1]).text(width=24)


def test_columns_that_do_not_fit_follow_in_tables_of_their_own():
    headers = ["method", *(f"task{number}" for number in range(5))]
    table = Table(headers=headers, rows=[["eva", *range(1, 6)], ["lora", *range(2, 6), Marked(7, "best")]])
    assert table.text(width=21).splitlines() == [
        "method  task0  task1",
        "──────  ─────  ─────",
        "eva         1      2",
        "lora        2      3",
        "",
        "method  task2  task3",
        "──────  ─────  ─────",
        "eva         3      4",
        "lora        4      5",
        "",
        "method  task4",
        "──────  ─────",
        "eva         5",
        "lora       7*",
        "* best",
    ]
    assert Table(headers=["", "b"], rows=[]).text(width=1) == Table(headers=["", "b"], rows=[]).text()


def test_programs_get_what_a_text_is_made_of():
    rows = [
        ["eva ρ=1", Marked(0.123456, "best", text="0.12 ± 0.01", also={"deviation": 0.01}), span((0.1, 0.2), ".1f")]
    ]
    table = Table(headers=["method", "score", "95% interval"], rows=[*rows, ["lora", None, "one seed"]])
    assert table.csv().splitlines() == [
        "method,score,score deviation,95% interval,95% interval low,95% interval high",
        "eva ρ=1,0.123456,0.01,0.1 to 0.2,0.1,0.2",
        "lora,,,one seed,,",
    ]
    assert table.to_json()["rows"][0]["score"] == 0.123456
    assert r"eva $\rho$=1 & \textbf{0.12 $\pm$ 0.01} & 0.1 to 0.2 \\" in table.latex()
    assert "| eva ρ=1 | **0.12 ± 0.01** | 0.1 to 0.2   |" in table.markdown()


def test_names_do_not_mark_up_a_table():
    names = ["a*b*", "x|y", "<i>", r"c\d", "e_f & 5%"]
    assert [
        line.split(" | ")[0] for line in markdown_table(["n", "m"], [[name, 1] for name in names]).splitlines()[2:]
    ] == [
        r"| a\*b\*  ",
        r"| x\|y    ",
        r"| \<i>    ",
        r"| c\\d    ",
        r"| e_f & 5%",
    ]
    body = latex_table(["n"], [[name] for name in names]).splitlines()
    assert r"c\textbackslash{}d \\" in body and r"e\_f \& 5\% \\" in body


def test_negative_numbers_have_a_minus_in_latex():
    body = latex_table(["method", "by"], [["eva-raw", "-0.0256 to +0.2039"], ["at 5e-05", "-.5"]])
    assert r"eva-raw & $-$0.0256 to +0.2039 \\" in body and r"at 5e-05 & $-$.5 \\" in body


def test_a_cell_that_leads_nowhere_stays():
    assert linked("a", "") == "a" and linked(None, "") is None
    assert linked("a", "#x") == Marked("a", href="#x")
    assert linked(Marked("a", "best"), "#x") == Marked("a", "best", href="#x")
