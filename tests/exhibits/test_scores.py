"""Tables of made-up results whose answers are known."""

from __future__ import annotations

import json
import math
import re

import pytest

from evatune.errors import EvaError
from evatune.exhibits import costs, scores
from evatune.exhibits.curves import steps_saved
from evatune.exhibits.view import View
from evatune.tables import Marked


def shown(cell: object) -> object:
    """Return what a cell shows, with its mark."""
    if not isinstance(cell, Marked):
        return cell
    return Marked(cell.text or cell.value, cell.mark) if cell.mark else cell.text or cell.value


def rows(table) -> dict[str, list[object]]:
    return {str(row[0]): list(map(shown, row[1:])) for row in table.rows}


def test_scores_have_mean_and_deviation_and_mark_best_and_second(results):
    found = scores.scores(View(folders=(str(results()),)))
    assert found.headers == ["method", "parameters", "sst2 (accuracy)", "cola (accuracy)", "mean"]
    cells = rows(found)
    assert cells["untuned"] == [None, "0.5000", "0.5000", None]
    assert cells["eva ρ=1"][1] == Marked("0.8200 ± 0.0200", "best")
    assert cells["eva ρ=2"][1] == Marked("0.8000 ± 0.0200", "second")
    assert cells["lora"][1] == "0.7200 ± 0.0200"
    assert cells["corda"] == [None, "this task has no such layers.", "this task has no such layers.", None]
    assert found.caption.endswith("Without a score on every task: corda.")


def test_lower_is_better_for_losses_and_metrics_are_scaled_before_they_are_averaged(results):
    found = scores.scores(View(folders=(str(results({"sst2": "accuracy", "text": "loss"})),)))
    assert found.headers[3] == "text (loss, lower is better)"
    cells = rows(found)
    assert cells["eva ρ=1"][2].mark == "best" and cells["eva ρ=1"][3] == Marked("1.0000", "best")
    assert "untuned model at 0" in found.caption


def test_interquartile_means_of_a_loss_are_losses_of_which_the_lowest_is_best(results):
    found = scores.intervals(View(folders=(str(results({"text": "loss"})),)))
    (best,) = (row for row in found.rows if row[1].mark == "best")
    assert best[0] == "eva ρ=1" and best[1].text == "0.3600"  # of 0.4, 0.36 and 0.32
    low, high = best[2].also.values()
    assert 0 < low <= best[1].value <= high
    assert found.caption.startswith("Interquartile mean on text over 3 seeds; lower is better.")


def test_means_of_groups_follow_the_tasks(results):
    folder = results({"sst2": "loss", "cola": "loss", "rte": "loss"})
    recipes = {"sst2": {"group": "one"}, "cola": {"group": "one"}, "rte": {"group": "pairs"}}
    (folder / "sweep.json").write_text(json.dumps({"sweep": {"recipes": recipes}}))
    found = scores.scores(View(folders=(str(folder),)))
    assert found.headers[-4:] == ["one (mean)", "pairs (mean)", "mean of groups", "mean"]
    cells = rows(found)
    assert cells["untuned"][4:] == [None] * 4
    assert cells["eva ρ=1"][4:] == [Marked("0.3600", "best")] * 4  # a loss is not turned for the reader
    assert cells["lora"][4:] == ["0.5600"] * 4


def test_a_single_seed_is_shown_without_interval_and_said_so(results):
    view = View(folders=(str(results(seeds=1)),))
    assert rows(scores.scores(view))["lora"][1] == "0.7000"
    assert "one seed, so without deviation" in scores.scores(view).caption
    assert rows(scores.intervals(view))["lora"][1] == "one seed"
    assert rows(scores.improvement(view))["pissa"][1] == "one seed"


def test_improvement_wins_and_ranks_agree_with_scores_that_never_overlap(results):
    view = View(folders=(str(results()),))
    assert rows(scores.improvement(view))["eva ρ=1"][0] == "1.00"
    assert rows(scores.improvement(view))["pissa"][0] == "0.00"
    assert rows(scores.wins(view))["eva ρ=1"] == [6, 0, 0]
    assert rows(scores.wins(view))["pissa"] == [0, 0, 6]
    ranks = rows(scores.ranks(view))
    assert ranks["eva ρ=1"][0] == Marked("1.00", "best") and ranks["pissa"][0] == "4.00"


def test_paired_differences_are_to_the_reference_and_corrected(results):
    view = View(folders=(str(results()),), against="pissa")
    found = scores.paired(view)
    assert len(found.rows) == 6 and "pissa" not in {row[1] for row in found.rows}
    lora = next(row for row in found.rows if row[:2] == ["sst2", "lora"])
    assert shown(lora[2]) == "+0.1000" and lora[4:7] == ["better", 3, 150]
    assert all(row[8].value >= row[7].value for row in found.rows)
    assert [row[1] for row in found.rows[:3]] == ["eva ρ=1", "eva ρ=2", "lora"]  # the best of a task is first


def test_nothing_is_said_of_a_single_seed(results):
    found = scores.paired(View(folders=(str(results(seeds=1)),)))
    assert {row[4] for row in found.rows} == {"one seed"}
    assert "how much another seed would change is not in the interval" in found.caption


def test_programs_get_numbers_with_deviations_and_ends_apart(results):
    view = View(folders=(str(results({"sst2": "accuracy"})),))
    cells = {row["method"]: row for row in scores.scores(view).to_json()["rows"]}
    assert cells["lora"]["sst2 (accuracy)"] == pytest.approx(0.72)
    assert cells["lora"]["sst2 (accuracy) deviation"] == pytest.approx(0.02)
    assert cells["lora"]["sst2 (accuracy) seeds"] == 3 and cells["untuned"]["sst2 (accuracy) seeds"] is None
    first = scores.paired(view).to_json()["rows"][0]
    assert first["95% interval low"] < first["better than lora by"] < first["95% interval high"]
    lines = scores.paired(view).csv().splitlines()
    assert lines[0].startswith(
        "task,method,better than lora by,95% interval,95% interval low,95% interval high,verdict"
    )


def test_scores_and_what_is_made_of_them_lead_to_their_runs(results):
    view = View(folders=(str(results()),))
    tables = [scores.scores, scores.paired, scores.intervals, scores.improvement, scores.ranks, scores.wins]
    for make in (*tables, scores.settings, costs.table, steps_saved):
        for row in make(view).rows:
            hrefs = {cell.href for cell in row if isinstance(cell, Marked) and cell.href}
            wanted = next((name for name in ("lora", "eva ρ=1", "eva ρ=2", "pissa") if name in row), None)
            assert hrefs or "corda" in row, (make.__name__, row)
            assert wanted is None or all(f"-{re.sub('[ =]', '-', wanted)}-lr0.01" in href for href in hrefs), hrefs


def test_every_number_of_the_scores_leads_to_its_runs(results):
    folder = results({"sst2": "accuracy", "cola": "accuracy", "rte": "accuracy"}, refused="")
    recipes = {"sst2": {"group": "one"}, "cola": {"group": "pairs"}, "rte": {"group": "pairs"}}
    (folder / "sweep.json").write_text(json.dumps({"sweep": {"recipes": recipes}}))
    table = scores.scores(View(folders=(str(folder),)))
    lora = dict(zip(table.headers, next(row for row in table.rows if row[0] == "lora"), strict=True))
    assert lora["parameters"].value == 1000
    hrefs = {title: cell.href for title, cell in lora.items() if title != "method"}
    assert hrefs["parameters"] == hrefs["sst2 (accuracy)"] == hrefs["one (mean)"] == hrefs["mean"]
    assert hrefs["pairs (mean)"] == hrefs["cola (accuracy)"] == "#runs-cola-lora-lr0.01-test"
    assert all(cell.href for row in table.rows for cell in row[1:] if cell is not None)


def test_parameters_that_differ_between_tasks_are_said_to_be_those_of_one(results):
    folder = results()
    assert "Parameters are" not in scores.scores(View(folders=(str(folder),))).caption
    records = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    other = [line.replace('"trainable": 1000', '"trainable": 1003') if '"cola"' in line else line for line in records]
    (folder / "records.jsonl").write_text("\n".join(other) + "\n")
    found = scores.scores(View(folders=(str(folder),)))
    assert rows(found)["lora"][0] == 1000 and " Parameters are those on sst2, " in found.caption


def test_settings_tell_grids_that_ended_early_and_why_scores_are_missing(results):
    found = scores.settings(View(folders=(str(results()),))).rows
    cells = {tuple(row[:2]): list(map(shown, row[2:])) for row in found}
    assert cells["sst2", "pissa"] == ["learning_rate 0.01", "learning_rate", "3 of 3", None]
    assert cells["sst2", "corda"] == [None, None, "0 of 3", "this task has no such layers."]


def test_a_reason_that_is_too_long_for_a_cell_stands_below_the_table(results):
    folder, reason = results(), "method 'corda' works on linear layers, and 'h.0.attn' is none."
    records = (folder / "records.jsonl").read_text()
    (folder / "records.jsonl").write_text(records.replace("this task has no such layers.", reason))
    view = View(folders=(str(folder),))
    for table in (scores.scores(view), scores.settings(view)):
        cells = [cell for row in table.rows for cell in row if "corda" in row and isinstance(cell, Marked)]
        assert [cell.text for cell in cells if cell.value == reason]
        assert {cell.text for cell in cells if cell.value == reason} == {"see below"}
        assert table.caption.endswith(f"No scores of corda on sst2, corda on cola: {reason}")


def test_costs_count_measuring_as_part_of_the_start(results):
    found = costs.table(View(folders=(str(results()),))).rows
    cells = {tuple(row[:2]): list(map(shown, row[2:])) for row in found}
    assert cells["sst2", "eva ρ=1"] == [900, "1.5", "6.0", "20.0%", "1.50"]
    assert cells["sst2", "lora"][1:4] == ["0.5", "6.0", "7.7%"]


def test_a_start_from_spectra_that_another_method_measured_has_no_cost_of_its_own(results):
    folder = results({"sst2": "accuracy"})
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in records:
        if record["method"] == "eva ρ=2" and record["state"] == "done":
            del record["seconds"]["measure"]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    view = View(folders=(str(folder),))
    found = costs.table(view)
    cells = {row[1]: list(map(shown, row[3:])) for row in found.rows}
    assert cells["eva ρ=2"] == [None, "6.0", None, "1.50"] and cells["eva ρ=1"][0] == "1.5"
    assert found.caption.endswith("all runs took spectra that runs of another method had measured.")
    (axes,) = costs.figure(view).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lora", "eva ρ=1", "pissa"]


def test_a_method_that_measures_while_it_initializes_has_a_start_of_its_own(results):
    folder = results({"sst2": "accuracy"})
    path = folder / "records.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"method": "pissa", "rho"', '"method": "eva-minor", "rho"')
    )
    cells = {row[1]: list(map(shown, row[3:])) for row in costs.table(View(folders=(str(folder),))).rows}
    assert cells["pissa"][:3] == ["0.5", "6.0", "7.7%"]


def test_steps_until_the_loss_of_the_reference(results):
    cells = rows(steps_saved(View(folders=(str(results()),))))
    assert cells["lora"][1] == 20 and cells["eva ρ=1"][1] < 20 and cells["pissa"][1] is None


def test_what_cannot_be_compared_is_told(results, tmp_path):
    folder = str(results())
    with pytest.raises(EvaError, match=r"have no method 'loar' to compare with.*did you mean 'lora'"):
        scores.wins(View(folders=(folder,), against="loar"))
    with pytest.raises(EvaError, match=r"have no method 'eav' to compare with \(did you mean 'eva'\?\)"):
        scores.wins(View(folders=(folder,), against="eav"))
    with pytest.raises(EvaError, match=r"runs of sst2 have no metric 'acuracy'.*did you mean 'accuracy'"):
        scores.scores(View(folders=(folder,), score="acuracy"))
    with pytest.raises(EvaError, match=r"it has no records\.jsonl"):
        scores.scores(View(folders=(str(tmp_path),)))
    assert math.isnan(scores.ranking_of(View(folders=(folder,)).board)[0].p) is False


@pytest.mark.parametrize("n_tasks", [2, 5])
def test_ranks_of_a_part_in_which_no_method_is_complete_are_refused(results, n_tasks):
    folder = results({f"task{number}": "accuracy" for number in range(n_tasks)})
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(line for line in lines if '"task": "task0"' in line))
    view = View(folders=(str(folder),))
    assert view.board.complete == []
    with pytest.raises(EvaError, match="ranks need two methods"):
        scores.ranks(view)


def test_a_method_with_fewer_seeds_is_not_marked_and_not_ranked(results):
    """One lucky seed is not the best method, and ranks over the seeds that all share would be ranks over one."""
    folder = results({"sst2": "accuracy"})
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [one for one in records if one["method"] != "eva ρ=1" or one["seed"] == 0]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    view = View(folders=(str(folder),))
    cell = rows(scores.scores(view))["eva ρ=1"][1]
    assert not isinstance(cell, Marked) and str(cell).endswith("(1 of 3 seeds)")
    table = scores.ranks(view)
    assert "eva ρ=1" not in rows(table)
    assert "over 3 seeds" in table.caption
    assert "Without a score for every seed: eva ρ=1." in table.caption


def test_a_mean_over_tasks_with_a_part_of_the_seeds_is_not_marked(results):
    folder = results()
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [one for one in records if one["name"] != "cola/eva ρ=1/lr0.01-seed1"]
    (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    found = scores.scores(View(folders=(str(folder),)))
    means = {row[0]: row[-1] for row in found.rows}
    assert means["eva ρ=1"].value == max(cell.value for cell in means.values() if cell) and not means["eva ρ=1"].mark
    assert means["eva ρ=2"].mark == "best"


def test_costs_leave_out_runs_that_went_on_after_an_interruption(results):
    folder = results({"sst2": "accuracy"})
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in records:
        if record["seed"] == 0 or record["method"] == "pissa":
            record |= {"seconds": {"train": 1.0}}  # of the session that began with a checkpoint
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    view = View(folders=(str(folder),))
    cells = {row[1]: list(map(shown, row[2:])) for row in costs.table(view).rows}
    assert cells["eva ρ=1"][:3] == [900, "1.5", "6.0"] and "pissa" not in cells
    assert costs.figure(view) is not None


def test_a_single_method_is_not_compared(results):
    folder = results({"sst2": "accuracy"})
    for name in ("choices.json", "records.jsonl"):
        lines = (folder / name).read_text()
        if name == "choices.json":
            lines = json.dumps([one for one in json.loads(lines) if one["method"] in ("lora", "corda")])
        (folder / name).write_text(lines)
    view = View(folders=(str(folder),))
    assert rows(scores.scores(view))["lora"][1] == "0.7200 ± 0.0200"
    for table in (scores.improvement, scores.wins):
        with pytest.raises(EvaError, match="lora and one more method need scores on every task"):
            table(view)
    with pytest.raises(EvaError, match="ranks need two methods"):
        scores.ranks(view)
    with pytest.raises(EvaError, match="nothing to pair: no other method shares a seed with lora"):
        scores.paired(view)


def test_a_metric_that_is_no_mean_over_examples_is_named_and_not_paired(results):
    folder = results({"reviews": "loss"})
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for record in records:
        if record["after"]:
            record["after"]["outcomes"] = {"nll": [9.0, 7.0], "tokens": [2.0, 2.0], "choices": []}
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(EvaError, match=r"or the metric \(loss\) is no mean over examples; name another one with"):
        scores.paired(View(folders=(str(folder),)))
