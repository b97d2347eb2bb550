from __future__ import annotations

import json

import pytest

from evatune.compare.forecast import forecast
from evatune.compare.loop import compare
from evatune.compare.standing import standings
from evatune.errors import EvaError


def test_a_grid_does_not_grow_beyond_what_its_setting_allows(sweep, fake_engine):
    engine = fake_engine(lambda run: run.point["adapter.lora_dropout"])
    results = compare(sweep(methods=["lora"], learning_rates=None, search={"lora_dropout": [0.02, 0.1, 0.5]}), engine)
    assert len(engine.names) == 3 + 2
    assert results.choices[0]["point"] == {"adapter.lora_dropout": 0.5}
    assert results.choices[0]["open"] == ["adapter.lora_dropout"]


def test_another_setting_still_grows_beside_one_that_may_not(sweep, fake_engine):
    def peak(run):
        return run.point["adapter.lora_dropout"] - abs(run.point["train.learning_rate"] - 1.0)

    results = compare(sweep(methods=["lora"], search={"lora_dropout": [0.1, 0.5]}), fake_engine(peak))
    assert results.choices[0]["point"] == {"train.learning_rate": 1.0, "adapter.lora_dropout": 0.5}
    assert results.choices[0]["open"] == ["adapter.lora_dropout"]


def test_the_metric_of_the_sweep_is_chosen_by_and_compared(sweep, fake_engine):
    scores = {1e-3: 0.5, 1e-2: 0.9, 1e-1: 0.1}
    results = compare(sweep(metric="loss"), fake_engine(lambda run: scores[run.point["train.learning_rate"]]))
    assert results.metric == "loss" and results.choices[0]["metric"] == "loss"
    row = standings(results).rows[0]
    assert row.metric == "loss" and row.point == {"train.learning_rate": 1e-2}
    assert row.scores == pytest.approx({0: 0.1, 1: 0.1})
    assert "loss" in json.dumps(standings(results).to_json())
    assert standings(results, metric="accuracy").rows[0].scores == pytest.approx({0: 0.9, 1: 0.9})


def test_a_setting_of_which_one_seed_failed_is_not_chosen(sweep, fake_engine):
    def run_of(run):
        if run.point["train.learning_rate"] == 1e-1 and run.seed != 1000:
            return "failed", "ValueError: the loss is not finite"
        return {1e-3: 0.1, 1e-2: 0.5, 1e-1: 0.9}.get(run.point["train.learning_rate"], 0.2)

    small = sweep(methods=["lora"], validation={"eval": "validation.jsonl", "seeds": 2}, widen=0)
    results = compare(small, fake_engine(run_of))
    assert results.choices[0]["point"] == {"train.learning_rate": 1e-2}


def test_a_method_that_searches_nothing_has_test_runs_alone(sweep, fake_engine):
    engine = fake_engine(lambda run: 0.5)
    one = sweep(
        methods={"lora": None, "eva": {"learning_rate": [1e-3, 1e-2]}}, learning_rates=[5e-4], validation=None, widen=0
    )
    with pytest.raises(EvaError, match="scores the same held-out examples to choose and to report"):
        compare(one, engine)
    assert engine.names == []
    one = sweep(methods=["lora", "eva"], learning_rates=[5e-4], validation=None)
    left = forecast(one).runs[0]
    assert (left.validation, left.test, left.left) == (0, 4, 4)
    results = compare(one, engine)
    assert engine.names == [f"task/{method}/lr0.0005-seed{seed}" for method in ("lora", "eva") for seed in (0, 1)]
    row = standings(results).rows[0]
    assert row.point == {"train.learning_rate": 5e-4} and row.scores == {0: 0.5, 1: 0.5} and row.open == []


def test_a_forecast_counts_all_that_stays_of_a_run(sweep, fake_engine):
    keeping = sweep(methods=["lora"], keep="adapters", widen=0)
    assert forecast(keeping).disk_bytes is None and "5 runs, 5 left" in forecast(keeping).text()
    folder = compare(keeping, fake_engine(lambda run: 0.5), limit=2).folder
    (folder / "runs" / "task" / "lora" / "lr0.01-seed1000" / "adapter" / "weights").write_text("x" * 100_000)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert forecast(keeping).disk_bytes == size / 2 * 5 > 250_000
    assert "5 runs, 3 left" in forecast(keeping).text()
