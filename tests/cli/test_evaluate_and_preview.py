"""`evatune evaluate` gives the run's own scores again, and `evatune preview` shows what is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evatune.cli.main import main


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request, tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; its recipe lies beside it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.yaml").write_text(
        f"model: {tiny_model}\n"
        f"data:\n  train: {tiny_data / 'train.jsonl'}\n  eval: {tiny_data / 'test.jsonl'}\n"
        f"adapter:\n  method: {request.param}\n  rank: 4\n"
        "train:\n  steps: 3\n  precision: fp32\n  learning_rate: 1e-2\n"
        "output: run\n"
    )
    assert main(["finetune", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_scores_what_its_record_says(run, capsys):
    after = json.loads((run / "run.json").read_text())["after"]
    again = told(capsys, run)
    assert again["metrics"] == pytest.approx(after["metrics"], rel=1e-6)
    assert again["intervals"]["loss"] == pytest.approx(after["intervals"]["loss"], rel=1e-6)
    low, high = again["intervals"]["loss"]
    assert low < again["metrics"]["loss"] < high
    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["metric", "score", "95%", "interval"]
    assert "16 examples" in out and "16 questions" in out


def test_the_recipe_with_a_model_and_an_adapter_scores_the_same(run, tiny_model, capsys):
    recipe = ["--recipe", run.parent / "recipe.yaml"]
    record = json.loads((run / "run.json").read_text())
    base = told(capsys, *recipe)
    assert base["adapter"] is None
    assert base["metrics"] == pytest.approx(record["before"]["metrics"], rel=1e-6)
    if (run / "adapter").is_dir():
        adapted = told(capsys, "--model", tiny_model, "--adapter", run / "adapter", *recipe)
        assert adapted["metrics"] == pytest.approx(record["after"]["metrics"], rel=1e-6)


def test_options_override_the_runs_recipe(run, tiny_data, tmp_path, capsys):
    outcomes = tmp_path / "outcomes.json"
    assert told(capsys, run, "--eval", tiny_data / "train.jsonl", "--limit", "9")["counts"]["examples"] == 9
    assert told(capsys, run, "--max-eval-examples", "5", "--save", outcomes)["counts"]["examples"] == 5
    kept = json.loads(outcomes.read_text())
    assert len(kept["outcomes"]["nll"]) == 5
    of_run = json.loads((run / "after.json").read_text())["outcomes"]
    assert kept["outcomes"]["right"] == of_run["right"][:5]
    assert kept["outcomes"]["nll"] == pytest.approx(of_run["nll"][:5], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no run: it has no recipe.yaml"),
        (["RUN", "--adapter", "x"], "RUN has a recipe and an adapter of its own"),
        (["RUN", "--limit", "0"], "limit is 0, but must be at least 1"),
        (["--model", "MODEL", "--eval", "EVAL", "--adapter", "x"], "x holds no adapter"),
        (["--model", "MODEL"], "names no held-out data"),
        (
            ["--model", "MODEL", "--task", "vision", "--page", "p.html"],
            "task 'vision' does not tell what each",
        ),
        ([], "nothing to score was named"),
    ],
)
def test_what_cannot_be_evaluated(run, tiny_model, tiny_data, capsys, arguments, message):
    words = {"RUN": str(run), "MODEL": str(tiny_model), "EVAL": str(tiny_data / "test.jsonl")}
    assert main(["evaluate", *(words.get(word, word) for word in arguments)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("has_adapter", [False, True], ids=["first", "extended"])
def test_an_unfinished_run_is_not_evaluated(run, tmp_path, capsys, has_adapter):
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    if has_adapter:  # of the end that the run had before it was made longer
        (tmp_path / "adapter").mkdir()
    assert main(["evaluate", str(tmp_path)]) == 1
    assert f"the run in {tmp_path} is not finished; go on with evatune finetune --resume" in capsys.readouterr().err


def test_preview_shows_three_examples(tiny_model, tiny_data, tmp_path, capsys):
    arguments = ["preview", "--model", str(tiny_model), "--data", str(tiny_data / "train.jsonl")]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.count("⟦the correct answer is") == 3
    assert main([*arguments, "--examples", "1", "--json"]) == 0
    (example,) = json.loads(capsys.readouterr().out)
    assert "".join(piece["text"] for piece in example["pieces"]) in text.replace("⟦", "").replace("⟧", "")
    assert main([*arguments, "--save", str(tmp_path / "examples.png")]) == 1
    assert "examples of task 'generation' are not pictures; leave out --save" in capsys.readouterr().err
    assert main([*arguments, "--examples", "0"]) == 1
    assert "--examples is 0" in capsys.readouterr().err


def test_outcomes_and_page(run, tmp_path, capsys):
    outcomes, page = tmp_path / "outcomes.jsonl", tmp_path / "page.html"
    scores = told(capsys, run, "--outcomes", outcomes, "--page", page)
    rows = [json.loads(line) for line in outcomes.read_text().splitlines()]
    assert len(rows) == 16
    assert set(rows[0]) >= {"question", "expected", "given", "right"}
    assert sum(row["right"] for row in rows) / 16 == pytest.approx(scores["metrics"]["accuracy"])
    assert rows == [json.loads(line) for line in (run / "after.jsonl").read_text().splitlines()]
    assert f"of {len(rows)}" in page.read_text()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []
    assert main(["evaluate", str(run), "--outcomes", str(outcomes)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_stopped_evaluation_goes_on(run, tmp_path, capsys, monkeypatch):
    from evatune.tasks.generation import evaluation

    outcomes, part = tmp_path / "outcomes.jsonl", tmp_path / "outcomes.jsonl.part"
    batches, real = ["--eval-batch-tokens", "200"], evaluation.score

    def stopped(*args, **options):
        yield next(real(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "score", stopped)
    assert main(["evaluate", str(run), *batches, "--outcomes", str(outcomes)]) == 130
    assert f"what was scored is in {part}; go on with --resume" in capsys.readouterr().err
    assert not outcomes.exists()
    monkeypatch.setattr(evaluation, "score", real)
    assert main(["evaluate", str(run), *batches, "--outcomes", str(outcomes)]) == 1
    assert "go on with --resume, or replace it: --overwrite" in capsys.readouterr().err
    for other in (["--limit", "3"], ["--precision", "bf16"]):
        assert main(["evaluate", str(run), *batches, "--outcomes", str(outcomes), "--resume", *other]) == 1
        assert "is of another evaluation" in capsys.readouterr().err

    skipped: list[int] = []

    def counting(*args, **options):
        skipped.extend(options["skip"])
        return real(*args, **options)

    monkeypatch.setattr(evaluation, "score", counting)
    scores = told(capsys, run, *batches, "--outcomes", outcomes, "--resume")
    assert skipped
    assert scores["metrics"] == pytest.approx(told(capsys, run)["metrics"], rel=1e-5)
    assert not part.exists()


def test_resume_needs_outcomes(run, capsys):
    assert main(["evaluate", str(run), "--resume"]) == 1
    assert "--resume needs --outcomes" in capsys.readouterr().err
