"""The loop over runs, with an engine that writes results instead of training."""

from __future__ import annotations

import json

import pytest

from evatune.compare import loop
from evatune.compare.loop import Progress, compare
from evatune.compare.results import Results
from evatune.compare.standing import standings
from evatune.compare.sweep import Sweep
from evatune.errors import EvaError


def rate(run) -> float:
    return run.point["train.learning_rate"]


def best_in_the_middle(run) -> float:
    return {1e-3: 0.5, 1e-2: 0.9, 1e-1: 0.1}.get(rate(run), 0.0) + 0.001 * run.seed * (run.stage == "test")


def test_the_setting_is_chosen_on_validation_and_scored_on_test(sweep, fake_engine):
    engine = fake_engine(best_in_the_middle)
    results = compare(sweep(), engine)
    assert engine.names == [
        *(f"task/{method}/lr{value}-seed1000" for method in ("lora", "eva") for value in ("0.001", "0.01", "0.1")),
        *(f"task/{method}/lr0.01-seed{seed}" for method in ("lora", "eva") for seed in (0, 1)),
    ]
    assert engine.closed
    rows = standings(results).rows
    assert [row.method for row in rows] == ["lora", "eva"]
    assert rows[0].point == {"train.learning_rate": 1e-2}
    assert rows[0].scores == pytest.approx({0: 0.9, 1: 0.901})
    assert rows[0].deviation == pytest.approx(0.001 / 2**0.5)
    assert rows[0].open == [] and rows[0].trainable == 12


def test_runs_whose_record_is_there_are_not_repeated(sweep, fake_engine):
    compare(sweep(), fake_engine(best_in_the_middle))
    again = fake_engine(best_in_the_middle)
    results = compare(sweep(methods=["lora", "eva", "dora"]), again)
    assert {name.split("/")[1] for name in again.names} == {"dora"}
    assert len(results.records) == 15


def test_settings_that_have_come_since_do_not_make_it_another_sweep(sweep, fake_engine):
    results = compare(sweep(), fake_engine(best_in_the_middle))
    path = results.folder / "records.jsonl"
    path.write_text(path.read_text().replace('"gradient_accumulation":1,', ""))
    again = fake_engine(best_in_the_middle)
    compare(sweep(), again)
    assert again.names == []


def test_a_limit_stops_early_and_the_next_call_goes_on(sweep, fake_engine):
    first, second = fake_engine(best_in_the_middle), fake_engine(best_in_the_middle)
    compare(sweep(methods=["lora"]), first, limit=4)
    compare(sweep(methods=["lora"]), second, limit=4)
    assert len(first.names) == 4 and second.names == ["task/lora/lr0.01-seed1"]


def test_a_limit_below_zero_is_refused(sweep, fake_engine):
    engine = fake_engine(best_in_the_middle)
    with pytest.raises(EvaError, match="--limit is -1, but must be at least 0"):
        compare(sweep(), engine, limit=-1)
    assert engine.closed


def test_a_line_that_a_crash_cut_short_is_done_again(sweep, fake_engine):
    results = compare(sweep(), fake_engine(best_in_the_middle))
    path = results.folder / "records.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-200])
    again = fake_engine(best_in_the_middle)
    compare(sweep(), again)
    assert again.names == ["task/eva/lr0.01-seed1"]
    assert len(path.read_text().splitlines()) == len(whole.splitlines())
    path.write_text("{}\n" + whole)
    with pytest.raises(EvaError, match=r"records\.jsonl, line 1 is no record"):
        Results(results.folder)


def test_records_are_compact_and_tell_what_was_run(sweep, fake_engine):
    results = compare(sweep(), fake_engine(best_in_the_middle))
    record = results.records["task/eva/lr0.01-seed0"]
    assert record["after"]["outcomes"] == {"right": [1, 0, 0.1235]}
    assert record["log"] == [{"step": 1, "loss": 0.12346}]
    assert record["recipe"]["train"]["learning_rate"] == 0.01
    assert "outcomes" not in results.records["task/eva/lr0.01-seed1000"]["after"]
    folder = results.folder / "runs" / "task" / "eva" / "lr0.01-seed0"
    assert (folder / "run.json").is_file() and not (folder / "adapter").exists()


def test_adapters_stay_if_asked(sweep, fake_engine):
    results = compare(sweep(keep="adapters"), fake_engine(best_in_the_middle))
    assert (results.folder / "runs" / "task" / "lora" / "lr0.01-seed0" / "adapter" / "weights").is_file()


def test_spectra_are_measured_once(sweep, fake_engine):
    engine = fake_engine(best_in_the_middle, slots=3)
    compare(sweep(methods=["eva", "eva+dora"]), engine)
    measured = [job.run.name for job in engine.started if job.spectra]
    assert measured == [f"task/eva/lr{name}" for name in ("0.001-seed1000", "0.01-seed0", "0.01-seed1")]
    given = [job.recipe["measure"]["spectra"] for job in engine.started if not job.spectra]
    assert len(given) == len(engine.started) - 3 and all(given)


def test_a_grid_grows_where_its_best_value_is_at_its_end(sweep, fake_engine):
    def peak_at_ten(run):
        return -abs(rate(run) - 10.0)

    engine = fake_engine(peak_at_ten)
    results = compare(sweep(methods=["lora"], widen=3), engine)
    assert [rate(job.run) for job in engine.started][3:6] == [1.0, 10.0, 100.0]
    assert standings(results).rows[0].point == {"train.learning_rate": 10.0}
    assert results.choices[0]["open"] == []


def test_an_end_that_stays_is_reported(sweep, fake_engine):
    results = compare(sweep(methods=["lora"], widen=1), fake_engine(lambda run: -rate(run)))
    assert results.choices[0]["open"] == ["train.learning_rate"]
    assert [entry[0]["train.learning_rate"] for entry in results.choices[0]["curve"]] == [1e-4, 1e-3, 1e-2, 1e-1]
    assert "best value at the end of the grid of learning_rate: all" in standings(results).text()


def test_refused_and_failed_runs_are_recorded_and_the_rest_goes_on(sweep, fake_engine):
    def fails(run):
        if run.cell.label == "lora":
            return "refused", "this task has no such layers."
        if rate(run) == 1e-1:
            return "failed", "ValueError: broken"
        return best_in_the_middle(run)

    results = compare(sweep(), fake_engine(fails))
    rows = standings(results).rows
    assert (rows[0].scores, rows[0].reason) == ({}, "this task has no such layers.")
    assert rows[1].point == {"train.learning_rate": 1e-2}  # at no end: the end beyond it has no score
    assert results.records["task/eva/lr0.1-seed1000"]["reason"] == "ValueError: broken"
    again = fake_engine(fails)
    compare(sweep(), again)
    assert again.names == []
    results = compare(sweep(), fake_engine(best_in_the_middle), again=True)
    assert {record["state"] for record in results.records.values()} == {"done"}
    assert standings(results).rows[0].mean is not None


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_a_method_whose_scores_are_not_finite_is_not_called_unfinished(sweep, fake_engine, stage):
    engine = fake_engine(lambda run: None if run.stage == stage else best_in_the_middle(run))
    unfinished = standings(compare(sweep(methods=["lora"]), engine, limit=2)).rows[0]
    assert unfinished.reason == "not finished"
    whole = standings(compare(sweep(methods=["lora"]), engine)).rows[0]
    assert whole.reason == "no score is finite" and whole.mean is None


def test_a_worker_that_dies_is_started_again_and_given_up_in_the_end(sweep, fake_engine):
    died = []

    def dies(run):
        if run.cell.label == "lora" and rate(run) == 1e-3:
            return "died", "its process ended with code -9"
        if run.cell.label == "eva" and not died:
            died.append(run)
            return "died", "its process ended with code -9"
        return best_in_the_middle(run)

    engine = fake_engine(dies)
    results = compare(sweep(tries=2), engine)
    lost = results.records["task/lora/lr0.001-seed1000"]
    assert (lost["state"], lost["tries"]) == ("failed", 2)
    assert lost["reason"] == "its process ended with code -9, 2 times"
    assert results.records[died[0].name]["state"] == "done" and results.records[died[0].name]["tries"] == 2
    assert engine.names.count("task/lora/lr0.001-seed1000") == 2


def test_results_of_another_sweep_or_version_are_refused(sweep, fake_engine):
    results = compare(sweep(), fake_engine(best_in_the_middle))
    with pytest.raises(EvaError, match=r"of another sweep: train\.steps was None and is 9; choose another output"):
        compare(sweep(settings={"steps": 9}), fake_engine(best_in_the_middle))
    path = results.folder / "records.jsonl"
    path.write_text(path.read_text().replace('"evatune":"0.1.0"', '"evatune":"0.0.7"'))
    with pytest.raises(EvaError, match=r"holds runs of evatune 0\.0\.7, and this is 0\.1\.0"):
        compare(sweep(), fake_engine(best_in_the_middle))
    compare(sweep(), fake_engine(best_in_the_middle), force=True)


def test_a_file_that_is_gone_is_named(sweep, fake_engine, tmp_path):
    """Without it the recipe has no path any more, and would look like one of another sweep."""
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("")
    compare(sweep(), fake_engine(best_in_the_middle))
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    match = rf"was made with {tmp_path}/train\.jsonl, and this file is not there; put it back"
    with pytest.raises(EvaError, match=match):
        compare(sweep(), fake_engine(best_in_the_middle))
    (tmp_path / "moved.jsonl").rename(tmp_path / "train.jsonl")
    again = fake_engine(best_in_the_middle)
    compare(sweep(), again)
    assert again.names == []


def test_two_processes_do_not_write_into_one_folder(sweep, fake_engine):
    results = Results(sweep().output)
    with results.writing({}), pytest.raises(EvaError, match="another process writes into"):
        compare(sweep(), fake_engine(best_in_the_middle))


def test_a_folder_that_cannot_be_written_is_told_before_a_run(sweep, fake_engine, tmp_path):
    (tmp_path / "file").write_text("")
    engine = fake_engine(best_in_the_middle)
    with pytest.raises(EvaError, match=r"cannot write .*file/results: .*file is not a writable folder; choose another"):
        compare(sweep(output=str(tmp_path / "file" / "results")), engine)
    assert not engine.started


def test_choices_are_written_also_if_the_sweep_is_interrupted(sweep, fake_engine):
    def interrupted(run):
        if run.name == "task/lora/lr0.01-seed1":
            raise KeyboardInterrupt
        return best_in_the_middle(run)

    with pytest.raises(KeyboardInterrupt):
        compare(sweep(methods=["lora"]), fake_engine(interrupted))
    row = standings(Results(sweep().output)).rows[0]
    assert row.point == {"train.learning_rate": 1e-2} and list(row.scores) == [0]
    assert Results(sweep().output).choices[0]["missing"] == 1


def test_a_sweep_goes_on_from_another_folder(sweep, fake_engine, tmp_path, monkeypatch):
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    sweep()
    compare(Sweep.load("sweep.yaml"), fake_engine(best_in_the_middle), limit=4)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    again = fake_engine(best_in_the_middle)
    results = compare(Sweep.load("../sweep.yaml"), again)
    assert len(again.names) == 10 - 4
    record = results.records["task/lora/lr0.001-seed1000"]
    assert record["recipe"]["data"]["train"] == ["../train.jsonl"]
    content = json.loads((results.folder / "sweep.json").read_text())["sweep"]
    assert "output" not in content and content["recipes"] == {"task": "../task.yaml"}


def test_a_score_that_is_not_finite_is_told_and_no_other_run_is_lost(sweep, fake_engine):
    lines = []
    results = compare(
        sweep(methods=["lora"]),
        fake_engine(lambda run: None if rate(run) == 1e-1 else best_in_the_middle(run)),
        say=lines.append,
    )
    assert lines[2].endswith("task/lora/lr0.1-seed1000  accuracy not finite")
    assert standings(results).rows[0].point == {"train.learning_rate": 1e-2}


def test_a_run_that_went_on_does_not_tell_how_long_others_take():
    lines = []
    progress = Progress(say=lines.append, slots=1)
    scores = {"headline": "accuracy", "metrics": {"accuracy": 0.5}}
    record = {"name": "a", "state": "done", "after": scores}
    progress.tell(record | {"wall_seconds": 1.0, "seconds": {"train": 0.5}}, running=0, left=2)
    progress.tell(record | {"wall_seconds": 30.0, "seconds": {"prepare": 1.0, "train": 28.0}}, running=0, left=1)
    assert "[1 done, 0 running, 2 waiting]" in lines[0] and "[2 done, 0 running, 1 waiting, 30 s left]" in lines[1]


def test_a_metric_that_the_data_do_not_have_ends_the_sweep_at_the_first_run(sweep, fake_engine):
    engine, told = fake_engine(lambda run: 0.5), []
    with pytest.raises(EvaError, match=r"the runs of task have no metric 'exact'; they have accuracy, loss\."):
        compare(sweep(metric="exact"), engine, say=told.append)
    assert len(engine.started) == len(told) == 1 and engine.closed
    results = compare(sweep(metric="loss"), fake_engine(lambda run: 0.5))  # what is done is kept
    assert results.metric == "loss" and next(iter(results.records)) == engine.names[0]
    with pytest.raises(EvaError, match="have no metric 'exact'"):
        compare(sweep(metric="exact"), none := fake_engine(lambda run: 0.5))
    assert not none.started


def test_too_little_disk_is_told_before_a_run_is_started(sweep, fake_engine, monkeypatch):
    monkeypatch.setattr(loop, "LEAST_DISK", 1 << 60)
    engine = fake_engine(best_in_the_middle)
    with pytest.raises(EvaError, match=r"has .*iB of disk left, and a run needs 1073741824\.0 GiB"):
        compare(sweep(), engine)
    assert engine.names == [] and engine.closed


def test_progress_tells_what_became_of_each_run(sweep, fake_engine):
    lines = []
    compare(sweep(methods=["lora"]), fake_engine(best_in_the_middle), say=lines.append)
    assert lines[0] == "[1 done, 0 running, 2 waiting, 0 s left]  task/lora/lr0.001-seed1000  accuracy 0.5"
    assert lines[-1].startswith("[5 done, 0 running, 0 waiting]")


def test_what_was_asked_for_is_kept(sweep, fake_engine):
    results = compare(sweep(), fake_engine(best_in_the_middle))
    content = json.loads((results.folder / "sweep.json").read_text())
    assert content["sweep"]["learning_rates"] == [1e-3, 1e-2, 1e-1]
