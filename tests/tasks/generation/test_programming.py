"""Programming problems: how a written answer becomes a program, and what a model that knows the answers scores."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
import torch
from tests.on_device import IN_INFERENCE_MODE

from evatune.errors import EvaError
from evatune.models import load_tokenizer
from evatune.tasks.generation.answers import Verdict
from evatune.tasks.generation.evaluation import evaluate
from evatune.tasks.generation.formats import find_format
from evatune.tasks.generation.outcomes import pass_at
from evatune.tasks.generation.programming import assembled, judge_programs
from evatune.tasks.generation.settings import GenerationData
from evatune.tasks.generation.task import Generation
from evatune.tasks.generation.writing import Sampling
from evatune.tasks.settings import ModelSettings

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\ndef half(n):\n    return n / 2\n\ndef area(r: float) -> float:\n    """Of a circle."""\n',
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert abs(candidate(1.0) - 3.14159) < 1e-3\n",
    "entry_point": "area",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\r\n  return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(-1, zero) == -1"],
    "test_setup_code": "zero = 0",
}
EVALPLUS = {
    "prompt": "def top(values):\n",
    "entry_point": "top",
    "canonical_solution": "    return max(values)\n",
    "base_input": [[[1, 2]]],
    "plus_input": [[[]], [[0.1, 0.3]]],
    "atol": 1e-6,
}


def example_of(row: dict):
    return find_format("auto", row, source="data")(row)


def verdict(row: dict, text: str) -> Verdict:
    return judge_programs([(text, example_of(row))])[0]


@pytest.mark.parametrize("row", [HUMANEVAL, MBPP, EVALPLUS], ids=["humaneval", "mbpp", "evalplus"])
def test_the_reference_solution_passes(row):
    example = example_of(row)
    assert verdict(row, example.completion).right
    assert example.judge == "program"
    assert "```python" in example.question
    assert example.asked == example.prompt  # it is continued; only in a chat the question is asked
    assert replace(example, template=None).asked == example.question


@pytest.mark.parametrize(
    ("row", "text", "right"),
    [
        (HUMANEVAL, "    return math.pi * r**2\n", True),
        (HUMANEVAL, "    return r\n", False),
        (HUMANEVAL, "Here:\n```python\ndef area(r):\n    return 2 * half(math.pi * r * r)\n```\nDone.", True),
        (HUMANEVAL, "```python\n    return math.pi * r * r\n```", True),
        (HUMANEVAL, "def area(r):\n    return math.pi * r * r", True),
        (HUMANEVAL, "```\nimport os\n```\nthen\n```python\ndef area(r): return math.pi * r * r\n", True),
        (HUMANEVAL, "I do not know", False),
        (MBPP, "```python\ndef add(a, b):\n    return a + b\n```", True),
        (MBPP, "def add(a, b):\n    return a - b", False),
        (EVALPLUS, "    return values[-1]\n", True),
        (EVALPLUS, "    return round(values[-1])\n", False),  # only an input of the + version shows it
    ],
)
def test_written_answers(row, text, right):
    assert verdict(row, text).right is right


def test_an_answer_keeps_imports_and_helpers_of_its_prompt():
    program = assembled("```python\ndef area(r):\n    return half(r)\n```", example_of(HUMANEVAL))
    assert program.startswith("import math\n\ndef half(n):")
    assert program.count("def area") == 1


@pytest.mark.parametrize(("n", "right", "k"), [(5, 2, 1), (5, 2, 3), (4, 0, 2), (3, 3, 2), (6, 1, 6)])
def test_pass_at_k_is_the_share_of_all_drawings(n, right, k):
    from itertools import combinations

    drawings = list(combinations([True] * right + [False] * (n - right), k))
    expected = sum(any(drawn) for drawn in drawings) / len(drawings)
    assert pass_at(k, [number < right for number in range(n)]) == pytest.approx(expected)


class StandIn(torch.nn.Module):
    """Writes known answers: the n-th one to a prompt at its n-th sample."""

    def __init__(self, tokenizer, answers: dict[str, list[str]]) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.answers = tokenizer, answers

    def generate(self, *, input_ids, attention_mask, generation_config, stopping_criteria):
        rows, left = [], {prompt: iter(texts) for prompt, texts in self.answers.items()}
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = next(left[self.tokenizer.decode(ids[mask.bool()])])
            rows.append(torch.cat([ids, torch.tensor(self.tokenizer(text)["input_ids"])]))
        longest = max(map(len, rows))
        pad = generation_config.pad_token_id
        return torch.stack([torch.cat([row, torch.full((longest - len(row),), pad)]) for row in rows])


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.mark.on_hardware(IN_INFERENCE_MODE)
def test_a_model_that_writes_known_programs(tokenizer):
    problems = [example_of(HUMANEVAL), example_of(MBPP)]
    right = [problem.completion for problem in problems]
    written = {
        problems[0].prompt: [right[0], "    return 1\n", right[0] + "\n\nprint('more')", "    while True: pass\n"],
        problems[1].prompt: ["def add(a, b): return 3", "add =", "import os; os._exit(0)", "nothing"],
    }
    scores = evaluate(
        StandIn(tokenizer, written),
        problems,
        tokenizer,
        scoring="generated",
        sampling=Sampling(samples=4, temperature=0.2),
        progress=False,
    )
    assert scores.headline == "pass@1"
    assert scores["pass@1"] == pytest.approx((2 / 4 + 0) / 2)
    assert scores["pass@4"] == pytest.approx(0.5)
    assert "limits that were tested here" in scores.notes[0]
    reasons = [answer["reason"] for answer in scores.examples[1]["written"]]
    assert reasons[0].startswith("AssertionError")
    assert reasons[1].startswith("SyntaxError")
    assert reasons[2] == "ended early"


def test_programs_run_only_with_permission(tiny_model, tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(HUMANEVAL) + "\n")

    def task(**options):
        data = GenerationData(eval=(str(path),), **options)
        return Generation(data=data, source=ModelSettings(name=str(tiny_model)), seed=0)

    with pytest.raises(EvaError, match=r"allow it with --allow-code-execution, or set data\.scoring to likelihood"):
        _ = task(scoring="generated").held_out
    assert len(task().held_out) == 1
    assert len(task(scoring="generated", allow_code_execution=True).held_out) == 1


def test_problems_in_the_chat_template(tiny_model, tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(HUMANEVAL) + "\n")
    data = GenerationData(eval=(str(path),), chat=True)
    (example,) = Generation(data=data, source=ModelSettings(name=str(tiny_model)), seed=0).held_out
    assert example.prompt.startswith("<user> Complete this Python function.")
    assert example.prompt.endswith("```</s><assistant> ")
    assert (example.stops, example.template, example.special_tokens) == ((), None, False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("codex_humaneval", 164), ("codex_mbpp", 490)])
def test_reference_solutions_of_the_real_problems_pass(original_data, name, least):
    folder = original_data / "oe_eval_tasks" / name / "gold_bpb_3shot"
    with gzip.open(folder / "requests.jsonl.gz", "rt") as lines:
        rows = {row["task_id"]: row for row in (json.loads(line)["doc"] for line in lines)}
    examples = [example_of(row) for row in rows.values()]
    verdicts = judge_programs([(example.completion, example) for example in examples])
    assert sum(verdict.right for verdict in verdicts) >= least, [v.reason for v in verdicts if not v.right]
