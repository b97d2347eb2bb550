"""Memory that measuring adds to the passes on an accelerator, counted without one (docs/accelerators.md#memory).

Command (no hub, no network; four to eight minutes on one core):

    python benchmarks/memory.py

A few layers of the shape of Llama-2-7B, with random weights in bfloat16 whose activations decay as 1/i, are measured at
rank 16 and rho = 2 with both stopping rules. Every allocation is counted by `torch.profiler`.

1. On the CPU, batches of 4 x 512 tokens: what a bare pass takes, and what measuring takes beside what it holds at the
   end of the pass.
2. On the device without hardware of the tests, whose memory is that of the CPU: what is held while a batch passes and
   when a check has looked at all inputs, and what the check takes at most. None of these depends on the rows of a
   batch, so these batches have fewer.
3. The same with a tolerance so small that all sketches get as wide as they can (`widest`). What waits in main memory is
   not counted.

The bound of the factorizations that run side by side is set to half of what it is on an accelerator, because a few
layers would not reach it; that of the sketches is set to the share of these layers. `whole` is an extrapolation to all
layers: what is held by their number, what is beside it as it is; for the factorizations of a check the bound stands,
which is more.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerator import SHAPES, bare, batches_of, let_decay
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import evatune
from evatune.activations.run import Run
from evatune.files import write_json
from evatune.hardware import describe_machine, versions_of
from evatune.pca import many, parking, together

ROOT = Path(__file__).parents[1]
MIB = 2**20
Counted = list[tuple[str, float, float]]
"""After each mark until the next: the most MiB that were held, and those held at its end."""


def model_of(shape: str, n_layers: int) -> LlamaForCausalLM:
    """Return the first layers of a model with random weights in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape] | {"num_hidden_layers": n_layers, "vocab_size": 128})
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            let_decay(module)
    return model


@contextmanager
def marked(marks: list[tuple[int, str]]) -> Iterator[None]:
    """Note when each pass and each end of a batch begins, and when a check has looked at all inputs."""
    ordinary = {name: getattr(Run, name) for name in ("begin_batch", "end_batch", "conclude")}

    def begin(self: Run) -> None:
        ordinary["begin_batch"](self)
        marks.append((time.time_ns(), "pass"))

    def end(self: Run, input_of: Any) -> None:
        marks.append((time.time_ns(), "end"))
        ordinary["end_batch"](self, input_of)
        marks.append((time.time_ns(), "between"))

    def conclude(self: Run, findings: Any) -> None:
        marks.append((time.time_ns(), "judged"))
        ordinary["conclude"](self, findings)

    Run.begin_batch, Run.end_batch, Run.conclude = begin, end, conclude  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, method in ordinary.items():
            setattr(Run, name, method)


def counted(run: Callable[[], Any]) -> Counted:
    """Count the memory of a run, above what was held before it."""
    gc.collect()
    marks = [(time.time_ns(), "start")]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, marked(marks):
        run()
    marks.append((time.time_ns(), "stop"))
    found = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in found)
    held, number, parts = 0, 0, []
    for (_, name), (until, _) in pairwise(marks):
        most = held
        while number < len(changes) and changes[number][0] < until:
            held += changes[number][1]
            most = max(most, held)
            number += 1
        parts.append((name, most / MIB, held / MIB))
    return parts


def measured(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]], **rules: float | None) -> Counted:
    """Count the memory of measuring batches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", evatune.EvaWarning)
        return counted(lambda: evatune.measure(model, batches, rank=16, rho=2.0, progress=False, **rules))


def uncounted(matrix: torch.Tensor) -> torch.Tensor:
    """Return main memory for a matrix, as `evatune.pca.parking.room_for` does, that torch has not allocated."""
    return torch.from_numpy(numpy.empty(matrix.nbytes, dtype=numpy.uint8)).view(matrix.dtype).view(matrix.shape)


def held(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]], **options: float) -> dict[str, float]:
    """Count what is held on the device without hardware, with both rules, which no input meets."""
    parts = measured(model, batches, tau=1 - 1e-9, min_gain=1e-9, **options)
    return {
        "held_in_a_pass_mib": max(end for name, _, end in parts if name == "pass"),
        "held_at_a_check_mib": max(end for name, _, end in parts if name == "end"),
        "most_at_a_check_mib": max(most for name, most, _ in parts if name == "end"),
    }


def main(arguments: list[str] | None = None) -> None:
    """Count, extrapolate, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/memory.json")
    args = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    from tests.fake_device import fake_device

    model = model_of(args.shape, args.layers)
    batches = batches_of(model, size=4, length=args.length, n=2)
    bare_mib = max(most for _, most, _ in counted(lambda: bare(model, batches[:1])))
    on_cpu = measured(model, batches, tau=None, min_gain=None)
    beside = [most - held for name, most, held in on_cpu if name == "pass"][-1]
    many.ACCELERATOR_BYTES = together.ACCELERATOR_BYTES = (bound := together.ACCELERATOR_BYTES) // 2
    share = SHAPES[args.shape]["num_hidden_layers"] / args.layers
    many.STATES_BYTES = int(many.STATES_BYTES / share)
    parking.room_for = uncounted
    with fake_device() as device:
        batches = batches_of(model, size=1, length=args.length, n=6)
        model.to(device)
        there = {"narrow": held(model, batches), "widest": held(model, batches, tolerance=1e-9)}
    # What the widest input's sketch takes while rows are added to it, if it waits in main memory between batches.
    visit_mib = evatune.StreamingPCA(32).cost(n_features=SHAPES[args.shape]["intermediate_size"]).state_bytes / MIB
    results = {
        "shape": args.shape,
        "layers": args.layers,
        "length": args.length,
        "bare_mib": bare_mib,
        "beside_it_mib": beside - bare_mib,
        "visit_mib": visit_mib,
        **there,
        "whole": {
            name: {
                "in_a_pass_above_bare_mib": share * found["held_in_a_pass_mib"]
                + beside
                - bare_mib
                + (visit_mib if name == "widest" else 0.0),
                "at_a_check_above_bare_mib": share * found["held_at_a_check_mib"] + bound / MIB - bare_mib,
            }
            for name, found in there.items()
        },
        "versions": versions_of("evatune", "torch", "transformers"),
        "machine": describe_machine(),
    }
    write_json(args.output, results)
    print(f"bare {bare_mib:.1f} MiB, beside what is held {beside - bare_mib:.1f} MiB")
    for name, found in there.items():
        for what, value in (found | results["whole"][name]).items():
            print(f"{name:8s} {what:28s} {value:8.1f}")


if __name__ == "__main__":
    main()
