"""Cost of initialization on an accelerator: seconds and peak memory beside the bare passes and beside other methods.

Command (random weights that are made on the device: no hub, no network; about eight minutes at most):

    python benchmarks/accelerator.py

1. The numeric tests run on the device (`EVATUNE_TEST_DEVICE`).
2. A model with the shape of Llama-2-7B passes batches of 4, 8 and 16 x 512 tokens: bare, with the backends `auto`,
   `exact` and `sketch` at rank 16, and `auto` at rank 128, always for the same number of batches without stopping rules
   (what random weights do says nothing about convergence). The share is of one epoch over `--train-examples` examples,
   whose seconds a step are measured in this very run with plain LoRA.
3. PEFT's EVA and other starts, and evatune beside them, on the first `--rival-layers` layers, since decomposing every
   weight of 7B takes long; `whole` is the time by the number of layers, an estimate.
4. How often the host waits for the device in one run, and a profile of the operations.

The results are written after every part. A part that would begin after `--minutes` is left out and listed. On a CPU a
tiny shape is used.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import evatune
from evatune.files import write_json
from evatune.hardware import best_device, describe_machine
from evatune.tables import text_table
from initialization import CappedLoader, CapReachedError

ROOT = Path(__file__).parents[1]
SHAPES = {
    "llama-2-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    "tiny": {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 4},
}
RIVALS = ("peft-eva", "pissa", "olora", "corda", "lora-ga")
NO_RULES: dict[str, Any] = {"tau": None, "min_gain": None, "progress": False}


def model_of(shape: str, device: torch.device, *, n_layers: int | None = None) -> LlamaForCausalLM:
    """Return a model with random weights in bfloat16 (float32 on a CPU), made on the device."""
    settings = SHAPES[shape] | ({} if n_layers is None else {"num_hidden_layers": n_layers})
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM._from_config(LlamaConfig(**settings), dtype=dtype).eval()


def batches_of(model: LlamaForCausalLM, *, size: int, length: int, n: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of random token numbers on the CPU, as a loader gives them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (n, size, length), generator=generator)
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]


def measured(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return seconds and peak memory of a run, in GB above what was there before; memory on a CPU is not measured."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    run()
    if device.type != "cuda":
        return {"seconds": time.perf_counter() - started}
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_gb": (torch.cuda.max_memory_allocated() - before) / 1e9}


@torch.no_grad()
def bare(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> None:
    """Pass batches up to the last layer, without the head, as measuring does."""
    device = next(model.parameters()).device
    for batch in batches:
        ids = batch["input_ids"].to(device, non_blocking=True)
        model.model(
            input_ids=ids, attention_mask=batch["attention_mask"].to(device, non_blocking=True), use_cache=False
        )


def step(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> None:
    """Compute the gradients of one batch."""
    model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
    model.zero_grad()


def rival(name: str, model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]], *, rank: int) -> None:
    """Start an adapter by another method, or by PEFT's EVA."""
    if name != "peft-eva":
        needs = {"batches": batches} if name in ("corda", "lora-ga") else {}
        evatune.prepare(model, method=name, rank=rank, gradient_batches=len(batches), keep_base=False, **needs)
        return
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora import eva

    config = LoraConfig(r=rank, init_lora_weights="eva", target_modules="all-linear", eva_config=EvaConfig(rho=2.0))
    there = [{key: value.to(model.device) for key, value in batch.items() if key != "labels"} for batch in batches]
    with suppress(CapReachedError):
        eva.get_eva_state_dict(model, CappedLoader(there, endless=False), config, show_progress_bar=False)


def parts(args: argparse.Namespace, results: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield name and action of every part; each writes into the results."""
    device = torch.device(args.device)
    whole = model_of(args.shape, device)
    n_layers = whole.config.num_hidden_layers

    def passes(size: int) -> None:
        batches = batches_of(whole, size=size, length=args.length, n=args.batches)
        bare(whole, batches[:2])  # warms up
        found = results.setdefault("passes", {}).setdefault(str(size), {})
        found["bare"] = measured(lambda: bare(whole, batches), device)
        lora = evatune.prepare(whole, method="lora", rank=16)
        step(lora, batches[0], device)
        found["lora step"] = measured(lambda: step(lora, batches[1], device), device)
        lora.unload()
        epoch = found["lora step"]["seconds"] * args.train_examples / size
        runs = {backend: {"backend": backend, "rank": 16} for backend in ("auto", "exact", "sketch")}
        if size == args.sizes[0]:
            rank = min(128, whole.config.hidden_size // 4)
            runs[f"auto, rank {rank}"] = {"backend": "auto", "rank": rank}
        evatune.measure(whole, batches[:2], rank=16, rho=2.0, **NO_RULES)  # warms up
        for name, options in runs.items():
            one = found[name] = measured(
                lambda options=options: evatune.measure(whole, batches, rho=2.0, **NO_RULES, **options), device
            )
            one |= {"over_bare": one["seconds"] / found["bare"]["seconds"], "share_of_epoch": one["seconds"] / epoch}

    def beside(name: str) -> None:
        model = model_of(args.shape, device, n_layers=min(args.rival_layers, n_layers))
        batches = batches_of(model, size=args.sizes[0], length=args.length, n=args.batches)
        if name == "evatune":
            action = lambda: evatune.prepare(  # noqa: E731
                model, method="eva", rank=16, rho=2.0, batches=batches, keep_base=False, **NO_RULES
            )
        else:
            action = lambda: rival(name, model, batches, rank=16)  # noqa: E731
        found = results.setdefault("beside", {})[name] = measured(action, device)
        found["whole"] = found["seconds"] * n_layers / model.config.num_hidden_layers

    def waits() -> None:
        batches = batches_of(whole, size=args.sizes[0], length=args.length, n=args.batches)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            evatune.measure(whole, batches, rank=16, rho=2.0, **NO_RULES)
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        synchronizing = [warning for warning in caught if "synchronizing" in str(warning.message)]
        places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in synchronizing)
        results["waits"] = {"batches": args.batches, "all": len(synchronizing), "places": dict(places.most_common(12))}

    def operations() -> None:
        batches = batches_of(whole, size=args.sizes[0], length=args.length, n=min(args.batches, 8))
        on_device = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        with profile(activities=[ProfilerActivity.CPU, *on_device]) as recorded:
            evatune.measure(whole, batches, rank=16, rho=2.0, **NO_RULES)
        key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, key))[:20]
        results["profile"] = [
            {"operation": event.key, "calls": event.count, "ms": getattr(event, key) / 1e3} for event in events
        ]

    if args.tests:
        yield "tests", lambda: results.update(tests=run_tests(args))
    for size in args.sizes:
        yield f"passes of {size}", lambda size=size: passes(size)
    for name in ("evatune", *RIVALS):
        yield f"{name} on {min(args.rival_layers, n_layers)} layers", lambda name=name: beside(name)
    yield "waits", waits
    yield "profile", operations


def run_tests(args: argparse.Namespace) -> dict[str, Any]:
    """Run the numeric tests on the device and return how they ended."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "tests/pca"]
    environment = os.environ | {"EVATUNE_TEST_DEVICE": args.device}
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=args.tests_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"ended": f"not within {args.tests_seconds} s"}
    failed = [line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"ended": ended.stdout.strip().splitlines()[-1], "failed": failed[:40]}


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    rows = []
    for size, found in results.get("passes", {}).items():
        for name, one in found.items():
            over, share = one.get("over_bare"), one.get("share_of_epoch")
            rows.append(
                [
                    f"{size} x {results['settings']['length']}",
                    name,
                    f"{one['seconds']:.2f} s",
                    "" if over is None else f"{over:.2f} x",
                    "" if share is None else f"{share:.3%}",
                    f"{one['peak_gb']:.2f} GB" if "peak_gb" in one else "",
                ]
            )
    if rows:
        print(text_table(["tokens", "run", "time", "over bare", "of an epoch", "peak above model"], rows))
    beside = results.get("beside", {})
    if beside:
        rows = [
            [name, f"{one['seconds']:.2f} s", f"{one['whole']:.1f} s", f"{one.get('peak_gb', 0):.2f} GB"]
            for name, one in beside.items()
        ]
        print(text_table(["start", "time", "all layers (estimate)", "peak above model"], rows))
    for name in ("tests", "waits", "failed", "left_out"):
        if results.get(name):
            print(f"{name}: {results[name]}")


def main() -> None:
    """Run all parts that fit into the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=str(best_device()))
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16], help="sequences of a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--rival-layers", type=int, default=1)
    parser.add_argument("--train-examples", type=int, default=395_000, help="examples of the epoch: MetaMathQA")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tests-seconds", type=float, default=150.0)
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "accelerator.json")
    args = parser.parse_args()
    args.shape = args.shape or ("tiny" if args.device == "cpu" else "llama-2-7b")
    started = time.perf_counter()
    results: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "machine": describe_machine(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "evatune")},
        "failed": {},
        "left_out": [],
    }
    for name, action in parts(args, results):
        if time.perf_counter() - started > 60 * args.minutes:
            results["left_out"].append(name)
            write_json(args.output, results)
            continue
        print(f"{time.perf_counter() - started:5.0f} s  {name}", flush=True)
        try:
            action()
        except Exception as error:  # one part that fails, for want of memory perhaps, takes no other with it
            results["failed"][name] = f"{type(error).__name__}: {error}"[:500]
        write_json(args.output, results)
    show(results)


if __name__ == "__main__":
    main()
