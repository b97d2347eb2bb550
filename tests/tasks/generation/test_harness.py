"""lm-evaluation-harness: our task definitions, and its scores against ours."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pyarrow
import pytest
import yaml
from pyarrow import parquet

from evatune.cli.main import main
from evatune.errors import EvaError
from evatune.recipe import load_recipe
from evatune.tasks.generation import harness
from evatune.tasks.generation.examples import load_examples
from evatune.tasks.generation.likelihood import score
from evatune.tasks.generation.named import GROUPS, NAMED
from evatune.training.setup import load_base, open_recipe

ROW = {"instruction": "Is it?\n\nAnswer format: true/false", "input": "", "output": "the correct answer is true"}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder of copies: BoolQ in the form of Hu et al. (2023), ARC-Easy in its original one, GSM8K."""
    folder = tmp_path_factory.mktemp("copies")
    keyed = {"question": "Two?", "choices": {"text": ["1", "2"], "label": ["A", "B"]}, "answerKey": "B"}
    rows = {
        "commonsense/boolq/test.json": [ROW | {"answer": "true"}] * 3,
        "commonsense/ARC-Easy/test.json": [keyed] * 2,
        "gsm8k/test.json": [{"question": "1 + 1?", "answer": "It is two.\n#### 2"}] * 2,
    }
    for name, content in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def opened(model: str, folder=None):
    recipe = load_recipe(None, {"model": model, "precision": "fp32"} | ({"folder": str(folder)} if folder else {}))
    task = open_recipe(recipe)
    return task, load_base(recipe, task)


@pytest.mark.parametrize("name", [name for name, task in NAMED.items() if task.held_out])
def test_every_task_to_score_on_is_defined_with_its_data_on_the_hub(name):
    stem = name.replace("/", "-").removeprefix("commonsense-")
    found, task = yaml.safe_load((harness.DEFINITIONS / f"{stem}.yaml").read_text()), NAMED[name]
    assert found["task"] == "evatune_" + stem.replace("-", "_").replace("+", "_plus")
    assert (found["dataset_path"], found.get("dataset_name")) == (task.hub, task.config)
    assert found["test_split"] == task.held_out


@pytest.mark.parametrize(("group", "count"), [("commonsense", 8), ("math", 7)])
def test_groups_have_all_of_their_tasks(group, count):
    found = yaml.safe_load((harness.DEFINITIONS / f"{group}.yaml").read_text())
    stems = [name.replace("/", "-").removeprefix("commonsense-") for name in GROUPS[group]]
    assert found["task"] == [f"evatune_{stem.replace('-', '_')}" for stem in stems]
    assert len(stems) == count


def test_the_command_scores_our_tasks_from_copies_on_disk(tiny_model, copies, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)  # which is no repository of git
    arguments = ["--model", str(tiny_model), "--folder", str(copies), "--harness", "lm-eval", "--limit", "2"]
    arguments += ["--tasks", "evatune_boolq", "evatune_arc_e", "--save", str(tmp_path / "scores.json")]
    assert main(["evaluate", *arguments, "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert "fatal" not in err
    assert {task: numbers["sample_len"] for task, numbers in found["results"].items()} == {
        "evatune_boolq": 2,
        "evatune_arc_e": 2,
    }
    samples = json.loads((tmp_path / "scores.json").read_text())["samples"]
    asked = samples["evatune_arc_e"][0]["doc"]
    assert asked["prompt"].endswith("Answer1: 1 Answer2: 2\n\nAnswer format: answer1/answer2\n")
    assert asked["choices"][asked["answer"]] == "the correct answer is answer2"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet", ".arrow"])
def test_copies_of_every_kind_in_a_folder_that_is_like_a_task(suffix, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "gsm8k").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of the task's name is no obstacle
    path, row = tmp_path / "gsm8k" / f"test{suffix}", {"question": 'A "1" + 1?', "answer": "It is 1 + 1. #### 2"}
    table = pyarrow.Table.from_pylist([row] * 2)
    if suffix == ".jsonl":
        path.write_text((json.dumps(row) + "\n") * 2)
    elif suffix == ".parquet":
        parquet.write_table(table, path)
    elif suffix == ".arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as file:
            file.write(table)
    else:
        mark, form = {".csv": (",", csv.QUOTE_ALL), ".tsv": ("\t", csv.QUOTE_NONE)}[suffix]
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter=mark, quoting=form, quotechar=None if suffix == ".tsv" else '"').writerows(
                [list(row), *[list(row.values())] * 2]
            )
    task, model = opened(str(tiny_model), ".")
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.generate_until", lambda *args, **_: ["so 2", "#### 3"])
    found = harness.evaluate(task, model, ["evatune_gsm8k"])
    assert found["results"]["evatune_gsm8k"]["acc,none"] == 0.5
    assert 'A "1" + 1?' in found["samples"]["evatune_gsm8k"][0]["doc"]["prompt"]


@pytest.mark.parametrize("name", ["evatune_piqa", "evatune_commonsense"])
def test_a_copy_that_is_missing_is_not_taken_from_the_hub(name, tiny_model, copies):
    task, model = opened(str(tiny_model), copies)
    with pytest.raises(EvaError, match=r"has no copy of task 'commonsense/.*; name only the tasks that are there"):
        harness.evaluate(task, model, [name])


def test_copies_of_several_endings(tiny_model, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for name in ("test-1.json", "test-2.csv"):
        (tmp_path / "gsm8k" / name).write_text("[]")
    task, model = opened(str(tiny_model), tmp_path)
    with pytest.raises(EvaError, match=r"the copies of task 'gsm8k' have several endings \(.*\); keep one"):
        harness.evaluate(task, model, ["evatune_gsm8k"])


def test_written_answers_are_judged_as_ours(tiny_model, copies, monkeypatch):
    task, model = opened(str(tiny_model), copies)
    monkeypatch.setattr(
        "lm_eval.models.huggingface.HFLM.generate_until", lambda self, requests, **_: ["so 2", "#### 3"]
    )
    found = harness.evaluate(task, model, ["evatune_gsm8k"])
    assert found["results"]["evatune_gsm8k"]["acc,none"] == 0.5
    assert "Let's think step by step" in found["samples"]["evatune_gsm8k"][0]["doc"]["prompt"]


@pytest.fixture
def answering(monkeypatch):
    """Let the model write these answers; return what it was asked."""
    asked = []

    def given(*answers):
        def generate_until(self, requests, **_):
            asked.extend(request.args for request in requests)
            return list(answers)

        monkeypatch.setattr("lm_eval.models.huggingface.HFLM.generate_until", generate_until)
        return asked

    return given


def test_mathematics_is_compared_by_value_and_a_group_counts_every_problem(tiny_model, tmp_path, answering):
    for config, count in zip(GROUPS["math"], [2, *[1] * 6], strict=True):
        (tmp_path / config).mkdir(parents=True)
        rows = [{"problem": f"{config} {n}?", "solution": "It is $\\boxed{\\frac{1}{2}}$."} for n in range(count)]
        (tmp_path / config / "test.json").write_text(json.dumps(rows))
    asked = answering("so 0.5", "The answer is: 1/2", "\\boxed{0.5}", "\\boxed{2}", *["no"] * 4)
    task, model = opened(str(tiny_model), tmp_path)
    found = harness.evaluate(task, model, ["evatune_math"])
    right = {name: numbers["acc,none"] for name, numbers in found["results"].items() if name != "evatune_math"}
    assert sorted(right.values()) == [0, 0, 0, 0, 0, 1, 1] and right["evatune_math_algebra"] == 1
    assert found["groups"]["evatune_math"]["acc,none"] == pytest.approx(3 / 8)
    assert "### Response: Let's think step by step.\n" in asked[0][0]
    assert (asked[0][1]["do_sample"], found["notes"]) == (False, [])


def test_mathematics_names_the_package_that_is_missing(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "math-500").mkdir()
    (tmp_path / "math-500" / "test.json").write_text(json.dumps([{"problem": "1?", "solution": "\\boxed{1}"}]))
    monkeypatch.setattr("evatune.tasks.generation.answers.find_spec", lambda name: None)
    task, model = opened(str(tiny_model), tmp_path)
    with pytest.raises(EvaError, match=r"needs the Python package math-verify; run: pip install 'evatune\[math\]'"):
        harness.evaluate(task, model, ["evatune_math_500"])


SUM = {"prompt": "def add(a, b):\n", "entry_point": "add", "canonical_solution": "    return a + b\n"}
SUM |= {"test": "def check(add):\n    assert add(1, 2) == 3"}
LAST = {
    "text": "Write a function last.",
    "code": "def last(a):\n    return a[-1]",
    "test_list": ["assert last([1]) == 1"],
}


@pytest.mark.parametrize(
    ("name", "row", "answers"),
    [
        ("humaneval", SUM, ["    return a + b", "    return a - b"]),
        ("humaneval+", SUM, ["```python\ndef add(a, b):\n    return b + a\n```", "    exit(0)"]),
        (
            "mbpp",
            LAST | {"test_setup_code": ""},
            ["def last(a):\n    return a[-1]", "def last(a):\n    return a[0] + 1"],
        ),
    ],
)
def test_programs_run_under_our_limits_with_permission_only(name, row, answers, tiny_model, tmp_path, answering):
    (tmp_path / name).mkdir()
    (tmp_path / name / "test.json").write_text(json.dumps([row] * 2))
    asked, own = answering(*answers), f"evatune_{name.replace('+', '_plus')}"
    task, model = opened(str(tiny_model), tmp_path)
    with pytest.raises(EvaError, match=rf"{own} runs programs that the model writes; allow it with --allow-code-exec"):
        harness.evaluate(task, model, [own])
    assert not asked
    settings = {"model": str(tiny_model), "folder": str(tmp_path), "allow_code_execution": True}
    found = harness.evaluate(open_recipe(load_recipe(None, settings)), model, [own])
    assert found["results"][own]["pass@1,none"] == 0.5
    assert found["notes"][0].startswith("programs ran under limits that were tested here")
    (example, *_) = load_examples([name], folder=str(tmp_path), held_out=True)
    prompt, how = asked[0]
    assert (prompt, how["until"]) == (example.prompt, list(example.stops))
    assert (how["do_sample"], how["temperature"], how["top_p"]) == (True, 0.2, 0.7)


def test_our_permission_is_not_for_programs_without_limits(tiny_model, monkeypatch):
    recipe = load_recipe(None, {"model": str(tiny_model), "allow_code_execution": True})
    task = open_recipe(recipe)
    model = load_base(recipe, task)

    def refuse(*, tasks, confirm_run_unsafe_code=False, **_):
        assert not confirm_run_unsafe_code
        raise ValueError(f"Attempted to run task: {tasks[0]}. Set confirm_run_unsafe_code=True to run this task.")

    monkeypatch.setattr("lm_eval.simple_evaluate", refuse)
    manager = SimpleNamespace(all_tasks=["humaneval"])  # the index of all tasks takes a while
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    with pytest.raises(EvaError, match="cannot score humaneval: one of them runs programs without limits"):
        harness.evaluate(task, model, ["humaneval"])


def test_an_unknown_task_is_named_with_its_near_misses(tiny_model):
    task, model = opened(str(tiny_model))
    with pytest.raises(EvaError, match=r"no task 'evatune_arc' \(did you mean 'evatune_arc_e', 'evatune_arc_c'"):
        harness.evaluate(task, model, ["evatune_arc"])


def test_a_harness_that_is_not_installed_names_the_extra(tiny_model, monkeypatch):
    task, model = opened(str(tiny_model))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaError, match=r"pip install 'evatune\[lm-eval\]'"):
        harness.evaluate(task, model, ["evatune_boolq"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--harness", "lm-eval"], "--harness and --tasks belong together"),
        (["--tasks", "a"], "--harness and --tasks belong together"),
        (["--harness", "lm-eval", "--tasks", "a", "--page", "x.html"], "are not for --harness"),
        (["--harness", "lm-eval", "--tasks", "a", "--task", "control"], "lm-eval scores no models of task 'control'"),
    ],
)
def test_wrong_use(arguments, message, tiny_model, capsys):
    assert main(["evaluate", "--model", str(tiny_model), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("arc_e", 120), ("obqa", 100)])
def test_likelihoods_are_those_of_the_harness(name, count, smollm2, real_data):
    """The harness counts the line break before an answer as a part of it, so it is moved there for the comparison."""
    folder = real_data("commonsense").parent
    task, model = opened(smollm2, folder)
    found = harness.evaluate(task, model, [f"evatune_{name}"], limit=count)
    samples = found["samples"][f"evatune_{name}"]
    source = f"commonsense/{name.replace('_', '-')}"
    examples = load_examples([source], folder=str(folder), held_out=True, tokenizer=task.tokenizer)
    by_prompt = {example.prompt: example for example in examples}
    ordered = [by_prompt[sample["doc"]["prompt"]] for sample in samples]
    ours = dict(pair for batch in score(model, ordered, task.tokenizer) for pair in batch)
    moved = [
        replace(
            example,
            pieces=((example.prompt.removesuffix("\n"), False), ("\n" + example.completion, True)),
            choices=tuple(f"\n{choice}" for choice in example.choices),
        )
        for example in ordered
    ]
    with_break = dict(pair for batch in score(model, moved, task.tokenizer) for pair in batch)
    assert len(samples) == count
    for number, sample in enumerate(samples):
        theirs = [likelihood for likelihood, _ in sample["filtered_resps"]]
        assert with_break[number].choices == pytest.approx(theirs, abs=2e-3)
        mine = ours[number].choices
        assert [value - mine[0] for value in mine] == pytest.approx([value - theirs[0] for value in theirs], abs=2e-3)
        assert (max(range(len(mine)), key=mine.__getitem__) == ordered[number].answer) == bool(sample["acc"])
