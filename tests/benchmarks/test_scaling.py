"""The arithmetic of the benchmark of cost, and tiny runs of it."""

from __future__ import annotations

import json
import sys

import pytest


def test_ratios_are_of_the_same_round(benchmark_script):
    median_ratio = benchmark_script("scaling").median_ratio
    # The machine slows down tenfold in the middle; each round is 2 : 1 all the same.
    assert median_ratio([[9.0, 2.0, 20.0], [9.0, 2.0, 20.0]], [[1.0, 1.0, 10.0], [1.0, 1.0, 10.0]], skip=1) == 2.0
    assert median_ratio([[9.0, 4.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], skip=1) == 4.0
    assert median_ratio([[9.0]], [[1.0]], skip=1) is None


def test_a_summary_keeps_refreshes_and_drops_stalls(benchmark_script):
    scaling = benchmark_script("scaling")
    runs = [[0.5, 0.010, 0.040, 0.010], [0.3, 0.010, 0.040, 0.010], [0.4, 0.010, 0.040, 9.0]]
    record = scaling.Record(batches=runs, finals=[0.1, 0.2, 5.0], facts={"missed": 0.5})
    facts = scaling.summarize(record, ours=None, linear=record, n_batches=4)
    assert facts["first_ms"] == pytest.approx(400)
    assert facts["batch_ms"] == pytest.approx(20)
    assert facts["usual_ms"] == pytest.approx(10)
    assert facts["final_ms"] == pytest.approx(200)
    assert facts["whole_ms"] == pytest.approx(660)
    assert facts["over_linear"] == 1
    assert facts["over_ours"] is None
    assert facts["missed"] == 0.5

    stopped = scaling.Record(batches=[[0.5, 0.2]])  # left in the middle, so nothing is said of a whole run
    facts = scaling.summarize(stopped, ours=record, linear=None, n_batches=4)
    assert (facts["whole_ms"], facts["final_ms"], facts["complete_runs"]) == (None, None, 0)
    assert facts["over_ours"] == pytest.approx(20)


@pytest.fixture
def tiny_scaling(benchmark_script, monkeypatch, tmp_path):
    """Run the script on two tiny widths and return its part of the results, its page and what it printed."""
    scaling = benchmark_script("scaling")
    sizes = tuple(scaling.Size(width=width, rank=2, rows=24) for width in (12, 20))
    axis = scaling.AXES["width"]
    monkeypatch.setitem(scaling.AXES, "width", type(axis)(**{**vars(axis), "sizes": sizes}))
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling, "IMAGES", tmp_path)
    monkeypatch.setattr(scaling, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("<!-- cost-width: begin -->\n<!-- cost-width: end -->\n")

    def run(*options: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["scaling.py", "width", "--threads", "1", "--batches", "3", *options])
        scaling.main()
        return json.loads((tmp_path / "scaling.json").read_text())["width"]

    return run


def test_a_tiny_run_over_widths(tiny_scaling, tmp_path, capsys):
    part = tiny_scaling("--repeats", "2")
    for point in part["points"]:
        found = point["contestants"]
        assert list(found) == [
            "evatune auto",
            "evatune exact",
            "evatune sketch",
            "PEFT",
            "scikit-learn",
            "linear layer",
        ]
        assert all(len(facts["seconds"]) == 2 and len(facts["seconds"][0]) == 3 for facts in found.values())
        assert found["evatune exact"]["missed"] == pytest.approx(0, abs=1e-5)
        assert 0 <= found["scikit-learn"]["missed"] < 0.1
        assert "missed" not in found["linear layer"]
        assert found["evatune auto"]["backend"] == "exact"
    page = (tmp_path / "page.md").read_text()
    assert "images/cost-width.png" in page
    assert "| evatune auto (exact) " in page
    assert (tmp_path / "cost-width.png").read_bytes().startswith(b"\x89PNG")
    assert "scikit-learn" in capsys.readouterr().out


def test_who_is_too_slow_is_left_out_at_larger_sizes(tiny_scaling):
    part = tiny_scaling("--repeats", "1", "--limit", "0")
    assert [len(point["contestants"]) for point in part["points"]] == [6, 1]
    assert list(part["points"][1]["contestants"]) == ["linear layer"]


def test_who_has_used_up_its_time_leaves_a_size(tiny_scaling):
    part = tiny_scaling("--repeats", "2", "--seconds", "0")
    facts = part["points"][0]["contestants"]["PEFT"]
    assert [len(run) for run in facts["seconds"]] == [1]
    assert facts["final_ms"] is facts["whole_ms"] is None
    assert "missed" not in facts


def test_a_quick_run_writes_nothing(tiny_scaling, tmp_path, monkeypatch):
    before = (tmp_path / "page.md").read_text()
    with pytest.raises(FileNotFoundError):
        tiny_scaling("--quick")
    assert (tmp_path / "page.md").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_flatness_compares_the_largest_rank_with_the_smallest(benchmark_script):
    def point(rank: int, batch: float) -> dict:
        facts = {"batch_ms": batch, "whole_ms": 10 * batch + rank}
        return {"size": {"width": 64, "rank": rank, "rows": 8}, "contestants": {"evatune auto": facts}}

    part = {"points": [point(4, 2.0), point(2, 1.0), point(8, 3.0)], "settings": {"batches": 16}}
    (sentence,) = benchmark_script("scaling").flatness(part)
    assert "8 components cost evatune 3.00 times as much a batch as 2, and 3.17 times" in sentence
