from __future__ import annotations

import json

import pytest

from evatune.exhibits import curves
from evatune.exhibits.scores import scores
from evatune.exhibits.view import View


@pytest.fixture
def drawn(monkeypatch):
    """What the last figure of bands was made of."""
    found: dict = {}
    monkeypatch.setattr(curves.comparisons, "bands", lambda lines, **options: found.update(options, curves=lines))
    return found


def test_rates_are_shown_by_the_metric_that_was_chosen_by(results, drawn):
    """With a loss the lowest value of a rate is shown, and called a loss, whatever the headline is."""
    folder = results({"sst2": "accuracy"})
    choices = json.loads((folder / "choices.json").read_text(encoding="utf-8"))
    for one in choices:
        one["metric"] = "loss"
        one["curve"] += [[{"train.learning_rate": 1e-3, "train.weight_decay": 0.1}, 0.4]] * bool(one["curve"])
    (folder / "choices.json").write_text(json.dumps(choices))
    curves.rates(View(folders=(str(folder),)))
    assert drawn["y"] == "loss on validation data"
    assert drawn["curves"]["lora"][:2] == ([1e-3, 1e-2], [0.4, 0.9])


def test_the_metric_of_the_sweep_is_that_of_its_tables(results):
    folder = results({"sst2": "accuracy"})
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in filter(lambda one: one["after"], records):
        record["after"]["metrics"]["loss"] = 1.0
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "sweep.json").write_text(json.dumps({"evatune": "0.1.0", "sweep": {"metric": "loss"}}))
    assert "sst2 (loss, lower is better)" in scores(View(folders=(str(folder),))).headers
    assert "sst2 (accuracy)" in scores(View(folders=(str(folder),), score="accuracy")).headers


def test_the_score_over_rho_has_a_curve_for_each_rank(results, drawn):
    folder = results({"sst2": "accuracy"})
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    choices = json.loads((folder / "choices.json").read_text(encoding="utf-8"))
    for record in [one for one in records if one["method"].startswith("eva")]:
        adapter = record["recipe"]["adapter"] | {"rank": 8}
        method = f"{record['method']} r=8"
        records.append(record | {"name": method, "method": method, "recipe": record["recipe"] | {"adapter": adapter}})
    choices += [one | {"method": f"{one['method']} r=8"} for one in choices if one["method"].startswith("eva")]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "choices.json").write_text(json.dumps(choices))
    curves.rho(View(folders=(str(folder),)))
    assert list(drawn["curves"]) == ["eva r=4 α=1", "eva r=8 α=1"]
