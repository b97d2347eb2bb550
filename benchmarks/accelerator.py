"""Cost of initialization on an accelerator: seconds and peak memory beside the bare passes and beside other methods.

Command (random weights that are made on the device: no hub, no network; `--minutes` at most, by default eight; evatune
need not be installed):

    python benchmarks/accelerator.py

1. A model with the shape of Llama-2-7B passes batches of 4, 8 and 16 x 512 tokens: bare, with the backends `auto`,
   `sketch` and `exact` at rank 16, and `auto` at rank 128, always for the same number of batches without stopping rules
   (what random weights do says nothing about convergence). Its weights are scaled so that the variances of activations
   decay as 1/i. `auto, rules` keeps the components that both rules compare; `auto, widest` demands so much of sketches
   that all get as wide as they can, and what the device has no room for waits in main memory. The share is of one epoch
   over `--train-examples` examples, whose seconds a step are measured in this very run with plain LoRA, `--micro`
   sequences at a time.
2. How often the host waits for the device in one run, and a profile of the operations.
3. PEFT's EVA and other starts, and evatune beside them, on the first `--rival-layers` layers, since decomposing every
   weight of 7B takes long; `whole` is the time by the number of layers, an estimate.
4. The tests run on the device (`EVATUNE_TEST_DEVICE`), in several processes where pytest-xdist is installed, for
   `--tests-seconds` at most; those that have failed until then are listed.

The most wanted parts come first. Every part is on its own: one that fails, or takes longer than `--part-seconds`, is
listed under `failed`, one for which no time is left under `left_out`, and the results are written after each. On a CPU
a tiny shape is used.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is asked of a hub; a slip would wait for a network

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "src"))  # where evatune is not installed

import evatune
from evatune.files import write_json
from evatune.hardware import best_device, describe_machine, versions_of
from evatune.tables import text_table

ROOT = Path(__file__).parents[1]
SHAPES = {
    "llama-2-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    "tiny": {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 4},
}
RIVALS = ("evatune", "peft-eva", "pissa", "olora", "corda", "lora-ga")
NO_RULES: dict[str, Any] = {"tau": None, "min_gain": None, "progress": False}
UNMET_RULES: dict[str, Any] = {"tau": 1 - 1e-9, "min_gain": 1e-9, "progress": False}
"""Both rules are applied, and no input meets them."""

TESTS = ("tests/pca", "tests/initialization", "tests/adapters", "tests/activations")
LEAST_SECONDS = 5.0
"""A part does not begin if less time is left."""
AGAIN = 10.0
"""A part that goes on although its time is over (an error may be swallowed) is ended again after these seconds."""
MOST_PROCESSES = 16
"""Tests run in half as many processes as the machine has cores, and as this."""
LAST_WORDS = 20.0
"""How many seconds of their time tests have to tell what has failed when they are ended."""


class TooLongError(BaseException):
    """A part took longer than it may. No `Exception`, because evatune passes a batch again after some of these."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End the `with` block with `TooLongError` after some seconds, between two operations."""

    def end(number: int, frame: Any) -> None:
        raise TooLongError(f"not within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def model_of(shape: str, device: torch.device, *, n_layers: int | None = None) -> LlamaForCausalLM:
    """Return a model with random weights in bfloat16 (float32 on a CPU), made on the device."""
    settings = SHAPES[shape] | ({} if n_layers is None else {"num_hidden_layers": n_layers})
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(LlamaConfig(**settings), dtype=dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            let_decay(module)
    return model


@torch.no_grad()
def let_decay(module: nn.Linear | nn.Embedding) -> None:
    """Scale the outputs of a module so that their variances are proportional to 1/i, with the same sum as before."""
    width = module.out_features if isinstance(module, nn.Linear) else module.embedding_dim
    scale = torch.arange(1, width + 1, device=module.weight.device).rsqrt()
    scale *= (width / scale.square().sum()).sqrt()
    module.weight.mul_(scale[:, None] if isinstance(module, nn.Linear) else scale)


def batches_of(model: LlamaForCausalLM, *, size: int, length: int, n: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of random token numbers on the CPU, as a loader gives them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (n, size, length), generator=generator)
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]


def measured(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return seconds and peak memory of a run, in GB above what was there before; memory on a CPU is not measured."""
    gc.collect()
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


def step(model: Any, batch: dict[str, torch.Tensor], device: torch.device, *, micro: int) -> None:
    """Compute the gradients of one batch, some sequences at a time, so that their activations fit."""
    for start in range(0, len(batch["input_ids"]), micro):
        model(**{name: value[start : start + micro].to(device) for name, value in batch.items()}).loss.backward()
    model.zero_grad()


def rival(name: str, model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]], *, rank: int) -> None:
    """Start an adapter by evatune, by another method, or by PEFT's EVA."""
    if name == "evatune":
        evatune.prepare(model, method="eva", rank=rank, rho=2.0, batches=batches, keep_base=False, **NO_RULES)
        return
    if name != "peft-eva":
        needs = {"batches": batches} if name in ("corda", "lora-ga") else {}
        evatune.prepare(model, method=name, rank=rank, gradient_batches=len(batches), keep_base=False, **needs)
        return
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora import eva

    from initialization import CappedLoader, CapReachedError

    config = LoraConfig(r=rank, init_lora_weights="eva", target_modules="all-linear", eva_config=EvaConfig(rho=2.0))
    there = [{key: value.to(model.device) for key, value in batch.items() if key != "labels"} for batch in batches]
    with suppress(CapReachedError):
        eva.get_eva_state_dict(model, CappedLoader(there, endless=False), config, show_progress_bar=False)


class Parts:
    """What is measured; every part writes into the results."""

    def __init__(self, args: argparse.Namespace, results: dict[str, Any]) -> None:
        self.args = args
        self.results = results
        self.ends = time.perf_counter() + 60 * args.minutes
        self.device = torch.device(args.device)

    @cached_property
    def whole(self) -> LlamaForCausalLM:
        """The model; it is made by the first part that needs it."""
        return model_of(self.args.shape, self.device)

    def all(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield name and action of every part, the most wanted first."""
        first, *others = self.args.sizes
        rivals = [(f"{name} on {self.args.rival_layers} layers", partial(self.beside, name)) for name in RIVALS]
        yield "the model", lambda: self.whole
        yield from self.passes(first, ranks=(16, 128))
        yield f"{first}: auto, rules", partial(self.measure, first, "auto, rules", rank=16, **UNMET_RULES)
        yield f"{first}: auto, widest", partial(self.measure, first, "auto, widest", rank=16, tolerance=1e-9)
        yield "waits", self.waits
        yield "profile", self.operations
        yield from rivals[:2]
        if self.args.tests:
            yield "tests", self.tests
        for size in others:
            yield from self.passes(size, ranks=(16,))
        yield from rivals[2:]

    def passes(self, size: int, *, ranks: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield the parts for batches of one size."""
        yield f"{size}: bare", partial(self.bare_and_step, size)
        for backend in ("auto", "sketch", "exact"):
            yield f"{size}: {backend}", partial(self.measure, size, backend, backend=backend, rank=ranks[0])
        for rank in ranks[1:]:
            rank = min(rank, SHAPES[self.args.shape]["hidden_size"] // 4)
            name = f"auto, rank {rank}"
            yield f"{size}: {name}", partial(self.measure, size, name, backend="auto", rank=rank)

    @property
    def seconds_left(self) -> float:
        """Seconds until all must be done."""
        return self.ends - time.perf_counter()

    def tests(self) -> None:
        """Run the tests."""
        seconds = min(self.args.tests_seconds, self.seconds_left - LEAST_SECONDS)
        self.results["tests"] = run_tests(self.args.device, seconds=seconds)

    def batches(self, size: int) -> list[dict[str, torch.Tensor]]:
        """Return the batches that every run of a size gets."""
        return batches_of(self.whole, size=size, length=self.args.length, n=self.args.batches)

    def bare_and_step(self, size: int) -> None:
        """Time the bare passes, and a training step."""
        batches, found = self.batches(size), self.results["passes"].setdefault(str(size), {})
        bare(self.whole, batches[:2])  # warms up
        found["bare"] = measured(lambda: bare(self.whole, batches), self.device)
        lora = evatune.prepare(self.whole, method="lora", rank=16)
        try:
            step(lora, batches[0], self.device, micro=self.args.micro)
            found["lora step"] = measured(
                lambda: step(lora, batches[1], self.device, micro=self.args.micro), self.device
            )
        finally:
            lora.unload()

    def measure(self, size: int, name: str, **options: Any) -> None:
        """Time a measurement; by default without stopping rules."""
        options = {"rho": 2.0} | NO_RULES | options
        batches, found = self.batches(size), self.results["passes"].setdefault(str(size), {})
        evatune.measure(self.whole, batches[:2], **options)  # warms up
        one = found[name] = measured(lambda: evatune.measure(self.whole, batches, **options), self.device)
        if "bare" in found:
            one["over_bare"] = one["seconds"] / found["bare"]["seconds"]
            if "peak_gb" in one:
                one["peak_gb_above_bare"] = one["peak_gb"] - found["bare"]["peak_gb"]
        if "lora step" in found:
            epoch = found["lora step"]["seconds"] * self.args.train_examples / size
            one["share_of_epoch"] = one["seconds"] / epoch

    def beside(self, name: str) -> None:
        """Time a start on the first layers."""
        n_all = SHAPES[self.args.shape]["num_hidden_layers"]
        n_layers = min(self.args.rival_layers, n_all)
        model = model_of(self.args.shape, self.device, n_layers=n_layers)
        batches = batches_of(model, size=self.args.sizes[0], length=self.args.length, n=self.args.batches)
        found = measured(lambda: rival(name, model, batches, rank=16), self.device)
        self.results["beside"][name] = found | {"whole": found["seconds"] * n_all / n_layers}

    def waits(self) -> None:
        """Count how often the host waits in a measurement, by place."""
        batches, is_cuda = self.batches(self.args.sizes[0]), self.device.type == "cuda"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if is_cuda:
                    torch.cuda.set_sync_debug_mode("warn")
                evatune.measure(self.whole, batches, rank=16, rho=2.0, **NO_RULES)
            finally:
                if is_cuda:
                    torch.cuda.set_sync_debug_mode("default")
        synchronizing = [warning for warning in caught if "synchronizing" in str(warning.message)]
        places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in synchronizing)
        self.results["waits"] = {
            "batches": self.args.batches,
            "all": len(synchronizing),
            "places": dict(places.most_common(12)),
        }

    def operations(self) -> None:
        """Take a profile of a measurement."""
        batches, is_cuda = self.batches(self.args.sizes[0])[:8], self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as recorded:
            evatune.measure(self.whole, batches, rank=16, rho=2.0, **NO_RULES)
        key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
        events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, key))[:20]
        self.results["profile"] = [
            {"operation": event.key, "calls": event.count, "ms": getattr(event, key) / 1e3} for event in events
        ]


def run_tests(device: str, *, seconds: float) -> dict[str, Any]:
    """Run the tests on the device and return how they ended, or how far they came and what had failed until then."""
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=line", "-m", "not slow", "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"EVATUNE_TEST_DEVICE": device, "PYTHONPATH": path}
    n_workers = min(os.cpu_count() or 1, MOST_PROCESSES) // 2
    is_spread = n_workers > 1 and find_spec("xdist") is not None
    if is_spread:
        command += ["-n", str(n_workers)]
    output, ended, until = "", f"not within {seconds:.0f} s", time.perf_counter() + seconds
    with subprocess.Popen(
        [*command, *TESTS],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            output, _ = running.communicate(timeout=max(seconds - LAST_WORDS, seconds / 2))
            ended = (output.strip().splitlines() or [f"exit status {running.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            while not output and time.perf_counter() < until:
                running.send_signal(signal.SIGINT)  # pytest then tells why; a measurement takes this for itself
                with suppress(subprocess.TimeoutExpired):
                    output, _ = running.communicate(timeout=12 if is_spread else 4)  # its processes have 10 s to end
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            output = output or running.communicate()[0]
    failed = [line for line in output.splitlines() if line.startswith("E  ") or re.search(r"\b(FAILED|ERROR)\b", line)]
    progress = re.findall(r"\[ *\d+%\]", output)[-1:]
    return {"ended": ended, "failed": failed[:80], "progress": progress, "output": output[-8000:]}


def card(device: torch.device) -> dict[str, Any]:
    """Return what tells one accelerator from another; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_gb": found.total_memory / 1e9,
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
    }


def installed(*names: str) -> dict[str, str]:
    """Return the versions of those packages that are there."""
    found: dict[str, str] = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found |= versions_of(name)
    return found


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
                    f"{one['peak_gb_above_bare']:.2f} GB" if "peak_gb_above_bare" in one else "",
                ]
            )
    if rows:
        print(text_table(["tokens", "run", "time", "over bare", "of an epoch", "peak above model", "above bare"], rows))
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
    parser.add_argument("--micro", type=int, default=4, help="sequences that train at a time")
    parser.add_argument("--rival-layers", type=int, default=1)
    parser.add_argument("--train-examples", type=int, default=395_000, help="examples of the epoch: MetaMathQA")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--part-seconds", type=float, default=60.0, help="what a part other than the tests may take")
    parser.add_argument("--tests-seconds", type=float, default=120.0)
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "accelerator.json")
    args = parser.parse_args()
    args.shape = args.shape or ("tiny" if args.device == "cpu" else "llama-2-7b")
    results: dict[str, Any] = {
        "card": card(torch.device(args.device)),
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "machine": describe_machine(),
        "versions": installed("torch", "transformers", "peft", "evatune"),
        "passes": {},
        "beside": {},
        "seconds": {},
        "failed": {},
        "tracebacks": {},
        "left_out": [],
    }
    print(f"{args.shape} on {results['card'].get('name') or args.device}", flush=True)
    parts = Parts(args, results)
    write_json(args.output, results)
    for name, action in parts.all():
        left = parts.seconds_left
        if left < LEAST_SECONDS:
            results["left_out"].append(name)
        else:
            print(f"{60 * args.minutes - left:5.0f} s  {name}", flush=True)
            try:
                with at_most(left if name == "tests" else min(left, args.part_seconds)):
                    action()
            except (Exception, TooLongError) as error:  # one part that fails, for want of memory perhaps, ends no other
                results["failed"][name] = f"{type(error).__name__}: {error}"[:500]
                results["tracebacks"][name] = "".join(traceback.format_tb(error.__traceback__))[-3000:]
            results["seconds"][name] = left - parts.seconds_left
        write_json(args.output, results)
    show(results)


if __name__ == "__main__":
    main()
