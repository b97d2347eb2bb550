"""What eigenvalues predict, and a tiny run of the benchmark."""

from __future__ import annotations

import json
import sys

import pytest
import yaml


def choice(method, rate, *, best_at_end=False):
    point = None if rate is None else {"train.learning_rate": rate}
    return {"method": method, "point": point, "open": ["train.learning_rate"] if best_at_end else []}


def test_rates_are_predicted_from_that_of_the_reference(benchmark_script):
    found = {
        name: {"eigenvalue": value} for name, value in (("lora", 1.0), ("sharp", 16.0), ("flat", 0.25), ("new", 4.0))
    }
    choices = [choice("lora", 8e-3), choice("sharp", 1e-3), choice("flat", 3.3e-2), choice("new", None)]
    rules = benchmark_script("suggest_rate").predictions(found, choices, reference="lora")
    adam, descent, same = rules.values()
    assert adam["methods"]["sharp"] == {"predicted": pytest.approx(2e-3), "best": 1e-3}
    assert adam["methods"]["new"] == {"predicted": pytest.approx(4e-3), "best": None}
    assert {name: rate["predicted"] for name, rate in descent["methods"].items()} == pytest.approx(
        {"sharp": 5e-4, "flat": 3.2e-2, "new": 2e-3}
    )
    assert (adam["known"], adam["within_factor_2"]) == (2, 1)  # 2 times too large is near enough, 2.06 times is not
    assert (descent["known"], descent["within_factor_2"]) == (2, 2)
    assert (same["known"], same["within_factor_2"]) == (2, 0)


def test_a_best_rate_at_the_end_of_its_grid_is_not_known(benchmark_script):
    predictions = benchmark_script("suggest_rate").predictions
    found = {"lora": {"eigenvalue": 1.0}, "eva": {"eigenvalue": 4.0}}
    choices = [choice("lora", 8e-3), choice("eva", 1e-3, best_at_end=True)]
    assert {rule["known"] for rule in predictions(found, choices, reference="lora").values()} == {0}
    assert predictions(found, choices, reference="eva") == {}


def test_the_new_head_is_left_out_wherever_it_is(benchmark_script):
    is_part = benchmark_script("suggest_rate").is_part
    assert is_part("base_model.model.classifier.modules_to_save.default.weight", ("classifier",))
    assert is_part("classifier.weight", ("score", "classifier"))
    assert not is_part("base_model.model.classifiers.0.lora_A.default.weight", ("classifier",))


def test_a_tiny_run(benchmark_script, monkeypatch, tmp_path, tiny_model, tiny_data, capsys):
    script = benchmark_script("suggest_rate")
    data = {"train": str(tiny_data / "train.jsonl"), "eval": str(tiny_data / "test.jsonl")}
    recipe = {"task": "generation", "model": str(tiny_model), "data": data, "adapter": {"rank": 2}}
    recipe |= {"measure": {"max_batches": 2, "batch_size": 4}, "train": {"steps": 2, "batch_size": 4}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sweep = {
        "recipes": {"tiny": "recipe.yaml"},
        "methods": {"lora": None, "lora+": None, "eva": None, "eva+dora": None},
    }
    sweep |= {"learning_rates": [1e-3, 1e-2], "validation": {"eval": data["train"]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    (tmp_path / "choices.json").write_text(json.dumps([choice("lora", 4e-3), choice("eva", 4e-3)]))
    options = [
        "--sweep",
        str(tmp_path / "sweep.yaml"),
        "--results",
        str(tmp_path),
        "--save",
        str(tmp_path / "out.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["suggest_rate.py", *options])
    script.main()
    results = json.loads((tmp_path / "out.json").read_text())
    lora, plus = (results["methods"][name] for name in ("lora", "lora+"))
    assert list(results["methods"]) == ["lora", "lora+", "eva", "eva+dora"]
    assert lora["eigenvalue"] == max(lora["largest"], -lora["smallest"]) > 0
    assert plus["eigenvalue"] > 10 * lora["eigenvalue"]  # B's rate is 16 times that of A
    assert lora["parameters"] == plus["parameters"] < results["methods"]["eva+dora"]["parameters"]
    assert results["predictions"]["1 / sqrt(eigenvalue)"]["known"] == 1
    assert "within a factor of 2" in capsys.readouterr().out

    monkeypatch.setattr(script, "one_method", None)  # what is there is not computed again
    (tmp_path / "choices.json").write_text(json.dumps([choice(name, 4e-3) for name in results["methods"]]))
    script.main()
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["methods"] == results["methods"]
    assert again["predictions"]["1 / sqrt(eigenvalue)"]["known"] == 3
