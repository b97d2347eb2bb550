"""How benchmarks show their results."""

from __future__ import annotations

import json

import pytest


def test_labels_that_touch_move_apart_and_others_stay(benchmark_script):
    spread = benchmark_script("publish").spread
    assert spread([5.0, 0.0, 2.0], least=1.0) == [5.0, 0.0, 2.0]
    assert spread([1.0, 1.0], least=1.0) == [0.5, 1.5]
    places = spread([1.0, 0.9, 1.8, 4.0], least=1.0)  # moving the lower two apart pushes them into the third
    assert places == pytest.approx([3.7 / 3, 0.7 / 3, 6.7 / 3, 4.0])


def test_ticks_that_touch_lose_their_labels(benchmark_script):
    apart = benchmark_script("publish").apart
    assert apart([256, 1024, 1536, 2048, 8192], least=0.09) == [256, 1024, 2048, 8192]
    assert apart([256, 1024, 1536, 2048], least=0.09) == [256, 1024, 1536, 2048]


def test_a_block_of_a_page_is_replaced_and_nothing_else(benchmark_script):
    fill_block = benchmark_script("publish").fill_block
    page = "before\n<!-- a: begin, by x -->\n\nold\n\n<!-- a: end -->\nafter\n<!-- b: begin -->\n<!-- b: end -->\n"
    once = fill_block(page, "a", "new")
    assert once == page.replace("old", "new")
    assert fill_block(once, "a", "new") == once
    with pytest.raises(ValueError, match=r"one block between '<!-- c: begin"):
        fill_block(page, "c", "new")
    with pytest.raises(ValueError, match=r"one block between '<!-- a: begin"):
        fill_block("<!-- a: begin -->\n" + page, "a", "new")


def test_results_of_other_runs_stay(benchmark_script, tmp_path):
    merge_results = benchmark_script("publish").merge_results
    path = tmp_path / "results" / "file.json"
    for part, facts in (("width", 1), ("rank", 2), ("width", 3)):
        merge_results(path, part, facts)
    assert json.loads(path.read_text()) == {"width": 3, "rank": 2}


def test_the_page_has_a_block_for_every_result(benchmark_script):
    publish, scaling = benchmark_script("publish"), benchmark_script("scaling")
    page = publish.PAGE.read_text(encoding="utf-8")
    for name in ["accuracy", *(f"cost-{axis}" for axis in scaling.AXES)]:
        publish.fill_block(page, name, "content")
