from __future__ import annotations

import itertools
import json

import pytest

from evatune.errors import EvaError
from evatune.exhibits import curves
from evatune.exhibits.scores import scores, settings
from evatune.exhibits.view import View
from evatune.report import comparisons
from evatune.report.style import PALETTE, looks


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


def test_rates_and_settings_are_shown_before_the_first_test_run(results, drawn):
    folder = results({"sst2": "accuracy"}, refused="")
    line = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()[0]
    first = json.loads(line) | {"stage": "validation"}
    (folder / "records.jsonl").write_text(json.dumps(first) + "\n")
    view = View(folders=(str(folder),))
    curves.rates(view)
    assert "lora" in drawn["curves"] and drawn["against"] == "lora"
    assert [row[4] for row in settings(view).rows] == ["0 of 3"] * len(drawn["curves"])
    with pytest.raises(EvaError, match="holds no scores of test runs yet"):
        scores(view)


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
    assert list(drawn["curves"]) == ["eva", "eva r=8"]


def test_the_score_over_rho_is_that_of_methods_which_differ_in_nothing_else(results, drawn):
    """Settings tell, not names: `wide` is `eva` with ρ = 3, and `eva ρ=4` was measured in another way."""
    folder = results({"sst2": "accuracy"})
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    choices = json.loads((folder / "choices.json").read_text(encoding="utf-8"))
    for name, rho, max_batches in (("wide", 3.0, 8), ("eva ρ=4", 4.0, 48)):
        for record in [one for one in records if one["method"] == "eva ρ=1"]:
            recipe = {"adapter": record["recipe"]["adapter"] | {"rho": rho}, "measure": {"max_batches": max_batches}}
            recipe |= {"train": {"seed": record["seed"], "learning_rate": 0.02}}
            point = {"train.learning_rate": 0.02}
            records.append(
                record | {"name": f"{name}/{record['seed']}", "method": name, "recipe": recipe, "point": point}
            )
        chosen = {"method": name, "point": {"train.learning_rate": 0.02}}
        choices.append(next(one for one in choices if one["method"] == "eva ρ=1") | chosen)
    for record in records:
        if record["method"] in ("eva ρ=1", "eva ρ=2"):
            train = {"seed": record["seed"], "learning_rate": 0.01}
            record["recipe"] |= {"measure": {"max_batches": 8}, "train": train}
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "choices.json").write_text(json.dumps(choices))
    curves.rho(View(folders=(str(folder),)))
    assert list(drawn["curves"]) == ["eva ρ=1, eva ρ=2, wide"]  # which have no word in common
    places, means, *_ = drawn["curves"]["eva ρ=1, eva ρ=2, wide"]
    assert places == [1.0, 2.0, 3.0] and means == pytest.approx([0.82, 0.8, 0.82])


def test_differences_beyond_chance_are_in_colour(results):
    figure = curves.differences(View(folders=(str(results({"sst2": "accuracy"})),)))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["eva ρ=1", "eva ρ=2", "pissa"]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [point.get_xdata()[0] for point in points] == pytest.approx([0.1, 0.08, -0.1])
    assert {point.get_color() for point in points} == {PALETTE[0]}
    one = curves.differences(View(folders=(str(results({"sst2": "accuracy"}, seeds=1, name="one")),)))
    assert PALETTE[0] not in {line.get_color() for line in one.axes[0].lines}


def test_values_of_very_different_size_are_points_on_a_logarithmic_axis():
    (bars,) = comparisons.bars({"a": 1.0, "b": 99.0}, x="x", title="t").axes
    (points,) = comparisons.bars({"a": 1.0, "b": 101.0}, x="x", title="t").axes
    assert (bars.get_xscale(), len(bars.patches)) == ("linear", 2)
    assert (points.get_xscale(), len(points.patches)) == ("log", 0)
    assert list(points.lines[0].get_xdata()) == [1.0, 101.0]
    assert comparisons.bars({"a": 0.0, "b": 101.0}, x="x", title="t").axes[0].get_xscale() == "linear"


def test_ticks_are_where_the_values_are():
    curve = ([1.0, 2.0], [0.5, 0.4], [0.4, 0.3], [0.6, 0.5])
    (axes,) = comparisons.bands({"eva": curve}, x="ρ", y="score", title="t", tick_places=True).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]


def test_names_of_points_stay_inside_the_axes():
    points = {f"method {number}": (1e6 * (1 + number % 3 / 50), 0.5 + number / 5000, 0.1) for number in range(30)}
    figure = comparisons.pareto(points | {"full": (2e7, 0.4, 0.1)}, x="parameters", y="score", title="Score")
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 31
    assert min(box.y0 for box in boxes) > axes.bbox.y0 - 3 and max(box.y1 for box in boxes) < axes.bbox.y1 + 3


def test_many_methods_have_a_panel_each(results):
    curve = ([1, 2, 3], [0.5, 0.4, 0.3], [0.4, 0.3, 0.2], [0.6, 0.5, 0.4])
    names = ["eva ρ=1", "lora", "lora+", "rslora", "pissa", "full", "dora", "olora"]
    figure = comparisons.bands(dict.fromkeys(names, curve), x="step", y="loss", title="Loss", against="lora")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == names
    dashed = [sum(line.get_linestyle() == "--" for line in axes.lines) for axes in shown]
    assert dashed == [1, 0, 1, 1, 1, 1, 1, 1]
    assert "dashed: lora" in figure.get_suptitle()
    assert len(comparisons.bands(dict.fromkeys(names[:6], curve), x="step", y="loss", title="Loss").axes) == 1


def test_labels_of_points_that_are_close_do_not_overlap():
    assert comparisons.spread([0.0, 10.0], gap=1.0) == [0.0, 10.0]
    assert comparisons.spread([1.0, 1.0, 1.0], gap=1.0) == pytest.approx([0.0, 1.0, 2.0])
    found = comparisons.spread([3.0, 1.0, 1.1, 8.0, 0.9], gap=1.0)
    order = sorted(range(5), key=lambda index: found[index])
    assert order == [4, 1, 2, 0, 3] and found[3] == 8.0
    assert all(found[b] - found[a] >= 1.0 - 1e-9 for a, b in itertools.pairwise(order))
    assert comparisons.spread([], gap=1.0) == []


def test_runs_of_one_colour_have_other_dashes():
    names = ["lora", "eva ρ=1", "eva ρ=2", "full", "rslora", "pissa", "lora+", "dora", "olora", "milora", "lora-ga"]
    found = looks(names)
    assert len({(one["color"], str(one["linestyle"])) for one in found.values()}) == len(names)
    assert found["eva ρ=1"]["color"] == found["eva ρ=2"]["color"]
