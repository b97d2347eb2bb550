"""Cost of initialization on an accelerator: seconds and peak memory beside the bare passes and beside other methods.

Command (random weights that are made on the device: no hub, no network; it ends after `--minutes`, by default 7.5,
counted from its start; evatune need not be installed):

    python benchmarks/accelerator.py

1. A model with the shape of Llama-2-7B passes batches of 4, 8 and 16 x 512 tokens: bare, with the backends `auto`,
   `sketch` and `exact` at rank 16, and `auto` at rank 128, always for the same number of batches without stopping rules
   (what random weights do says nothing about convergence). Its weights are scaled so that the variances of activations
   decay as 1/i. `auto, rules` keeps the components that both rules compare; `auto, widest` demands so much of sketches
   that all get as wide as they can, and what the device has no room for waits in main memory. The share is of one epoch
   over `--train-examples` examples, whose seconds a step are measured in this very run with plain LoRA, `--micro`
   sequences at a time.
2. Eigendecompositions of stacks by the device and by the threads of the host, alone and in a whole measurement: which
   of them evatune asks depends on the version of torch (`evatune.pca.together.ONE_BY_ONE`). The single operations that
   adding rows and a refresh are made of, and some that they could be made of.
3. How often the host waits for the device in one run, and a profile of the operations of the device and of the host.
4. PEFT's EVA and other starts, and evatune beside them, on the first `--rival-layers` layers with a small vocabulary,
   since decomposing every weight of 7B takes long; `whole` is the time by the number of layers, an estimate.
5. The tests run on the device (`EVATUNE_TEST_DEVICE`), in several processes where pytest-xdist is installed, for
   `--tests-seconds` at most; those that have failed until then are listed, and what pytest says is beside the results.

The most wanted parts come first. Every part is on its own: one that fails, or takes longer than `--part-seconds`, is
listed under `failed`, one for which no time is left under `left_out`, and the results are written after each. SIGTERM
ends the part that runs, and the script. On a CPU a tiny shape is used.
"""

# The clock starts before torch is imported, which may take long the first time.
# ruff: noqa: E402
from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # this evatune, not one that is installed
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is asked of a hub; a slip would wait for a network

import torch
from accelerator_tables import show
from device_tests import read_tests, run_tests
from operations import of_rows, of_stack, times
from starts import STARTS, begin
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import evatune
from evatune.files import write_json
from evatune.hardware import best_device, describe_machine, versions_of
from evatune.pca.together import Eigh
from evatune.pca.widths import sketch_width, widest_sketch

SHAPES = {
    "llama-2-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    "tiny": {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 4},
}
NO_RULES: dict[str, Any] = {"tau": None, "min_gain": None, "progress": False}
UNMET_RULES: dict[str, Any] = {"tau": 1 - 1e-9, "min_gain": 1e-9, "progress": False}
"""Both rules are applied, and no input meets them."""

N_STACKED = 12
"""How many sketches of Llama-2-7B an accelerator refreshes at once, about."""
LEAST_SECONDS = 5.0
"""A part does not begin if less time is left."""
AGAIN = 10.0
"""A part that goes on although its time is over (an error may be swallowed) is ended again after these seconds."""


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


def model_of(shape: str, device: torch.device, **changes: int) -> LlamaForCausalLM:
    """Return a model with random weights in bfloat16 (float32 on a CPU), made on the device."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape] | changes)).eval()
    finally:
        torch.set_default_dtype(before)
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


def give_back(device: torch.device) -> None:
    """Free the memory that nothing holds any more, perhaps of a part that has failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return seconds and peak memory of a run, in GB above what was there before; memory on a CPU is not measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
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
        ids, mask = (batch[name].to(device, non_blocking=True) for name in ("input_ids", "attention_mask"))
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)


def step(model: Any, batch: dict[str, torch.Tensor], device: torch.device, *, micro: int) -> None:
    """Compute the gradients of one batch, some sequences at a time, so that their activations fit."""
    for start in range(0, len(batch["input_ids"]), micro):
        model(**{name: value[start : start + micro].to(device) for name, value in batch.items()}).loss.backward()
    model.zero_grad()


class Parts:
    """What is measured; every part writes into the results."""

    def __init__(self, args: argparse.Namespace, results: dict[str, Any]) -> None:
        self.args = args
        self.results = results
        self.ends = STARTED + 60 * args.minutes
        self.device = torch.device(args.device)
        self._is_inside = False

    @cached_property
    def whole(self) -> LlamaForCausalLM:
        """The model; it is made by the first part that needs it."""
        return model_of(self.args.shape, self.device)

    def all(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield name and action of every part, the most wanted first."""
        first, *others = self.args.sizes
        rank = min(128, SHAPES[self.args.shape]["hidden_size"] // 4)
        rivals = [(f"{name} on {self.args.rival_layers} layers", partial(self.beside, name)) for name in STARTS]
        yield "the model", self.model
        yield "PEFT", partial(import_module, "peft")  # which takes a while the first time
        yield f"{first}: bare", partial(self.bare_and_step, first)
        yield self.measuring(first, "auto")
        yield self.measuring(first, f"auto, rank {rank}", rank=rank)
        yield self.measuring(first, "auto, rules", **UNMET_RULES)
        yield self.measuring(first, "auto, widest", tolerance=1e-9)
        yield "factorizations", self.factorizations
        yield "operations", self.operations
        yield f"{first}: auto, decomposed elsewhere", partial(self.elsewhere, first)
        yield "waits", self.waits
        yield "profile", self.profile
        yield self.measuring(first, "exact", backend="exact")
        yield from rivals[:2]
        for size in others:
            yield f"{size}: bare", partial(self.bare_and_step, size)
            yield self.measuring(size, "auto")
        if self.args.tests:
            yield "tests", self.tests
        yield from rivals[2:]
        yield self.measuring(first, "sketch", backend="sketch")
        for size in others:
            yield self.measuring(size, "sketch", backend="sketch")
            yield self.measuring(size, "exact", backend="exact")

    def measuring(self, size: int, name: str, **options: Any) -> tuple[str, Callable[[], Any]]:
        """Return the part in which batches of a size are measured."""
        return f"{size}: {name}", partial(self.measure, size, name, **options)

    def run(self, name: str, action: Callable[[], Any]) -> None:
        """Run a part if there is time for it, and note how it ended."""
        left, results = self.seconds_left, self.results
        if left < LEAST_SECONDS:
            results["left_out"].append(name)
            return
        print(f"{time.perf_counter() - STARTED:5.0f} s  {name}", flush=True)
        give_back(self.device)
        try:
            with at_most(left if name == "tests" else min(left, self.args.part_seconds)):
                self._is_inside = True
                action()
        except (Exception, TooLongError) as error:  # one part that fails, for want of memory perhaps, ends no other
            results["failed"][name] = f"{type(error).__name__}: {error}"[:500]
            results["tracebacks"][name] = "".join(traceback.format_tb(error.__traceback__))[-3000:]
        finally:
            self._is_inside = False
        results["seconds"][name] = left - self.seconds_left

    def end(self, number: int, frame: Any) -> None:
        """End the part that runs, and leave out all that follow; a handler for SIGTERM."""
        self.ends = time.perf_counter()
        if self._is_inside:
            raise TooLongError("told to end")

    @property
    def seconds_left(self) -> float:
        """Seconds until all must be done."""
        return self.ends - time.perf_counter()

    def model(self) -> None:
        """Make the model, and note what it is."""
        config, weight = self.whole.config, next(self.whole.parameters())
        self.results["model"] = {"parameters": self.whole.num_parameters(), "dtype": str(weight.dtype)}
        self.results["model"]["attention"] = getattr(config, "_attn_implementation", None)

    def tests(self) -> None:
        """Run the tests."""
        seconds = min(self.args.tests_seconds, self.seconds_left - LEAST_SECONDS)
        path = self.args.output.with_suffix(".tests.txt")
        ended = f"not within {seconds:.0f} s"
        try:
            ended = run_tests(self.args.device, seconds=seconds, output=path)
        finally:
            self.results["tests"] = read_tests(path, ended=ended)

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
            once = partial(step, lora, batches[1], self.device, micro=self.args.micro)
            found["lora step"] = measured(once, self.device)
        finally:
            lora.unload()

    def measure(self, size: int, name: str, **options: Any) -> None:
        """Time a measurement; by default at rank 16 without stopping rules."""
        options = {"rank": 16, "rho": 2.0} | NO_RULES | options
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
        # PEFT passes batches through the head as well, which would count for each layer in the estimate.
        model = model_of(self.args.shape, self.device, num_hidden_layers=n_layers, vocab_size=128)
        batches = batches_of(model, size=self.args.sizes[0], length=self.args.length, n=self.args.rival_batches)
        found: dict[str, float] = {"passes": 0}
        self.results["beside"][name] = found

        def count(module: nn.Module, args: Any) -> None:
            found["passes"] += 1
            found["until_last_pass"] = time.perf_counter() - began

        model.register_forward_pre_hook(count)
        began = time.perf_counter()
        found |= measured(lambda: begin(name, model, batches, rank=16), self.device)
        found["whole"] = found["seconds"] * n_all / n_layers

    def factorizations(self) -> None:
        """Time the eigendecompositions that a group of sketches needs, by the device and by the threads of the host."""
        hidden = SHAPES[self.args.shape]["hidden_size"]
        for size in {sketch_width(32, hidden), sketch_width(256, hidden), widest_sketch(32, hidden)}:
            factors = torch.randn(N_STACKED, size, 2 * size, dtype=torch.float64, device=self.device)
            requests = [Eigh(matrix) for matrix in factors @ factors.mT]
            for place in ("device", "host"):
                with decomposed_by(place):
                    list(Eigh.answers(requests[:2]))  # warms up
                    one = measured(lambda requests=requests: list(Eigh.answers(requests)), self.device)
                self.results["factorizations"][f"{N_STACKED} x {size} x {size}, {place}"] = one["seconds"]

    def operations(self) -> None:
        """Time the operations that adding rows and a refresh are made of."""
        shape, n_rows = SHAPES[self.args.shape], self.args.sizes[0] * self.args.length
        wait, found = partial(synchronize, self.device), self.results["operations"]
        for width in (shape["hidden_size"], shape["intermediate_size"]):
            found[f"rows, {n_rows} x {width}"] = times(of_rows(n_rows, width, self.device), wait)
        size = sketch_width(32, shape["hidden_size"])
        found[f"{N_STACKED} x {size} x {size}"] = times(of_stack(N_STACKED, size, self.device), wait)

    def elsewhere(self, size: int) -> None:
        """Time a measurement whose eigendecompositions are made where evatune would not have them made."""
        place = "device" if Eigh.is_for_host(self.device.type, 128) else "host"
        with decomposed_by(place):
            self.measure(size, f"auto, decomposed by the {place}")

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
        synchronizing = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
        places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in synchronizing)
        found = {"batches": self.args.batches, "all": len(synchronizing), "places": dict(places.most_common(12))}
        self.results["waits"] = found

    def profile(self) -> None:
        """Take a profile of a measurement."""
        batches, is_cuda = self.batches(self.args.sizes[0])[:8], self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as recorded:
            one = measured(lambda: evatune.measure(self.whole, batches, rank=16, rho=2.0, **NO_RULES), self.device)
        events = recorded.key_averages()
        self.results["profile"] = {
            "batches": len(batches),
            "seconds": one["seconds"],
            "device": longest(events, "self_device_time_total") if is_cuda else [],
            "host": longest(events, "self_cpu_time_total"),
        }


def longest(events: Iterable[Any], key: str) -> list[dict[str, Any]]:
    """Return the operations of a profile that took longest."""
    taken = sorted(events, key=lambda event: -getattr(event, key))[:25]
    return [{"operation": event.key, "calls": event.count, "ms": getattr(event, key) / 1e3} for event in taken]


@contextmanager
def decomposed_by(place: str) -> Iterator[None]:
    """Let eigendecompositions be made by the `device` or by the `host` in the `with` block."""
    before = vars(Eigh)["is_for_host"]
    Eigh.is_for_host = lambda device_type, size: place == "host"  # type: ignore[method-assign]
    try:
        yield
    finally:
        Eigh.is_for_host = before  # type: ignore[method-assign]


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
    parser.add_argument("--rival-batches", type=int, default=4)
    parser.add_argument("--train-examples", type=int, default=395_000, help="examples of the epoch: MetaMathQA")
    parser.add_argument("--minutes", type=float, default=7.5, help="from the start of the program")
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
        "factorizations": {},
        "operations": {},
        "beside": {},
        "seconds": {},
        "failed": {},
        "tracebacks": {},
        "left_out": [],
    }
    print(f"{args.shape} on {results['card'].get('name') or args.device}", flush=True)
    parts = Parts(args, results)
    before = signal.signal(signal.SIGTERM, parts.end)
    try:
        write_json(args.output, results)
        for name, action in parts.all():
            parts.run(name, action)
            write_json(args.output, results)
    finally:
        signal.signal(signal.SIGTERM, before)
    show(results)


if __name__ == "__main__":
    main()
