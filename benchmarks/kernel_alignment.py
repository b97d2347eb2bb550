"""How much of the neural tangent kernel's leading eigenvectors each start of A keeps: EVA, random, PiSSA, MiLoRA.

    EVATUNE_DATA=path/to/data python benchmarks/kernel_alignment.py

MiniLM-L6 on sentences of SST-2, every attention and feed-forward matrix. The gradient is that of the loss with a new
head, as in the first step of a training. Writes `benchmarks/results/kernel_alignment.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import set_seed

from evatune.analyses.kernel import alignment, gradient_kernels
from evatune.files import write_json
from evatune.hardware import describe_machine
from evatune.recipe import load_recipe
from evatune.spectra import Spectra
from evatune.tables import text_table
from evatune.training.record import library_versions
from evatune.training.setup import load_base, measure_recipe, open_recipe

HERE = Path(__file__).parent
LEADING = (1, 4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", type=Path, default=HERE / "results" / "kernel_alignment.json")
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        rows += one_seed(seed, options)
    shown = [
        [row["rank"], row["start"], row["seed"], *(f"{row['alignment'][str(n)]:.3f}" for n in LEADING)] for row in rows
    ]
    print(text_table(["rank", "start", "seed", *(f"leading {n}" for n in LEADING)], shown))
    content = {
        "examples": options.examples,
        "rows": rows,
        "machine": describe_machine(),
        "versions": library_versions(),
    }
    write_json(options.save, content, indent=1)


def one_seed(seed: int, options: argparse.Namespace) -> list[dict]:
    """Return the alignments of one seed: of the head, the sentences and the random matrices."""
    most = max(options.ranks)
    recipe = load_recipe(
        HERE.parent / "recipes" / "small" / "minilm-sst2.yaml",
        {"rank": most, "rho": 1, "train.seed": seed, "precision": "fp32", "max_batches": 16, "threads": 1},
    )
    task = open_recipe(recipe)
    model = load_base(recipe, task).eval()
    spectra = measure_recipe(recipe, model, task=task, progress=False)
    examples = [task.collate([task.train[-1 - number]]) for number in range(options.examples)]  # not those measured
    starts = {}
    for rank in options.ranks:
        for name, matrices in starts_of(model, spectra, rank, seed).items():
            starts[f"{rank} {name}"] = matrices
    kernels = gradient_kernels(model, examples, lambda model, batch: model(**batch).loss, starts=starts)
    return [
        {
            "seed": seed,
            "rank": int(key.split()[0]),
            "start": key.split()[1],
            "alignment": {str(n): alignment(kernels["full"], kernel, n_leading=n) for n in LEADING},
        }
        for key, kernel in kernels.items()
        if key != "full"
    ]


def starts_of(model: torch.nn.Module, spectra: Spectra, rank: int, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return the rows of A of each start; all are orthonormal, so only their directions differ."""
    set_seed(seed)
    found: dict[str, dict[str, torch.Tensor]] = {"eva": {}, "random": {}, "pissa": {}, "milora": {}}
    for name in spectra:
        weight = model.get_submodule(name).weight.detach()
        right = torch.linalg.svd(weight, full_matrices=False)[2]
        found["eva"][name] = spectra[name].components[:rank]
        found["random"][name] = torch.linalg.qr(torch.randn(weight.shape[1], rank))[0].T
        found["pissa"][name], found["milora"][name] = right[:rank], right[-rank:]
    return found


if __name__ == "__main__":
    main()
