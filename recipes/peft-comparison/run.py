"""Run EVA in PEFT's own method comparison (MetaMathQA → GSM8K), with its data, steps, evaluation and record.

    git clone https://github.com/huggingface/peft
    pip install evatune ./peft -r peft/method_comparison/MetaMathQA/requirements.txt
    python recipes/peft-comparison/run.py peft/method_comparison/MetaMathQA --rho 2

PEFT's comparison has no entry for EVA: its script makes the adapter and trains at once, and EVA has to look at data in
between. This program makes the folder of an experiment there (LoRA's rank 32 and alpha 64), calls the comparison's own
script, and initializes the adapter where that script has made it, with batches of its own training data. So the record
is written by PEFT's code, and stands beside its other records. The total time includes the initialization; the training
time and the memory during training do not.

The comparison's defaults: Llama-3.2-3B in bfloat16, 5,000 steps of 4 examples of at most 768 tokens, learning rate 1e-4
with a cosine schedule.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evatune
from evatune.errors import EvaError

NEEDED = ("main", "get_model", "get_tokenizer", "get_train_config", "get_train_valid_test_datasets")
"""What the comparison's script must have."""


def main(words: list[str] | None = None) -> None:
    """Run the experiment, or with --dry-run only say what would be run."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0], epilog="\n".join(lines[1:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, help="the folder method_comparison/MetaMathQA of a clone of PEFT")
    parser.add_argument("--rho", type=float, default=2.0, help="most of a target over the average rank (default: 2)")
    parser.add_argument("--batches", type=int, default=64, help="most batches that are measured (default: 64)")
    parser.add_argument("--learning-rate", type=float, help="instead of the comparison's own")
    parser.add_argument("--dry-run", action="store_true", help="write the experiment and stop")
    options = parser.parse_args(words)
    try:
        run(options)
    except EvaError as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    """Write the folder of the experiment, and run it with the comparison's script."""
    folder = options.comparison.resolve()
    if not (folder / "run.py").is_file() or not (folder / "default_training_params.json").is_file():
        raise EvaError(f"{folder} is not PEFT's comparison: it has no run.py and default_training_params.json.")
    name = write_experiment(folder, rho=options.rho, learning_rate=options.learning_rate)
    print(f"experiment  {folder / 'experiments' / name}", file=sys.stderr)
    if options.dry_run:
        return
    sys.path.insert(0, str(folder))
    os.chdir(folder)  # its script wants relative paths
    script: Any = importlib.import_module("run")
    if missing := [needed for needed in NEEDED if not hasattr(script, needed)]:
        raise EvaError(f"the comparison's run.py has no {', '.join(missing)}; this program knows an older one.")
    script.print_verbose = lambda *words, **_: print(*words, file=sys.stderr)
    make = script.get_model
    experiment = Path("experiments") / name
    settings = script.get_train_config(str(experiment / "training_params.json"))

    def make_and_initialize(**arguments: Any) -> Any:
        model = make(**arguments)
        plan = evatune.initialize(
            model, batches(script, settings, device=model.device), rho=options.rho, max_batches=options.batches
        )
        print(f"initialized {len(plan.ranks)} targets, {plan.n_parameters:,} parameters", file=sys.stderr)
        return model

    script.get_model = make_and_initialize
    script.main(path_experiment=str(experiment), experiment_name=name, clean=True)


def write_experiment(folder: Path, *, rho: float, learning_rate: float | None) -> str:
    """Write the experiment that the comparison's script reads, and return its name.

    Raises:
        EvaError: it is there with other settings.
    """
    rate = f"-lr_{learning_rate:g}" if learning_rate is not None else ""
    name = f"lora/llama-3.2-3B-rank32-eva-rho{rho:g}{rate}"
    target = folder / "experiments" / name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).parent / "adapter_config.json", target)
    changed: dict[str, Any] = {}
    if learning_rate is not None:
        default = json.loads((folder / "default_training_params.json").read_text(encoding="utf-8"))
        changed["optimizer_kwargs"] = default["optimizer_kwargs"] | {"lr": learning_rate}
    (target / "training_params.json").write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
    return name


def batches(script: Any, settings: Any, *, device: Any) -> Iterator[dict[str, Any]]:
    """Yield batches of the comparison's training data, padded as its script pads them."""
    tokenizer = script.get_tokenizer(model_id=settings.model_id, max_seq_length=settings.max_seq_length)
    train, *_ = script.get_train_valid_test_datasets(
        tokenizer=tokenizer, query_template=settings.query_template, print_fn=lambda *_: None
    )
    for start in range(0, len(train), settings.batch_size):
        rows = train[start : start + settings.batch_size]
        kept = {name: rows[name] for name in ("input_ids", "attention_mask")}
        yield dict(tokenizer.pad(kept, return_tensors="pt").to(device))


if __name__ == "__main__":
    main()
