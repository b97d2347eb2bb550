"""Peak memory of measuring a model that is larger than memory: a Llama-2-7B-shaped checkpoint with random weights.

Command (writes 13 GB to the folder, needs 15 GB free there, and deletes them at the end):

    python benchmarks/larger_than_memory.py --folder /somewhere/with/space --batches 4

The checkpoint is written in shards of bfloat16. `evatune.measure_from_disk` runs in a process of its own, and its peak
resident memory, files that it has mapped included, is what the operating system says at its end. Results go to the
terminal and to benchmarks/results/larger_than_memory.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results"
GIB = 2**30


def write_checkpoint(folder: Path, n_layers: int) -> int:
    """Write the checkpoint, one layer a shard, and return its bytes."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=n_layers, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    n_bytes = 2 * sum(shape.numel() for shape in shapes.values())
    if shutil.disk_usage(folder.parent).free < n_bytes + 2 * GIB:
        raise SystemExit(f"{folder.parent} has less than {(n_bytes + 2 * GIB) / GIB:.0f} GiB free.")
    folder.mkdir()
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(max(shape.numel() for shape in shapes.values()) * 3 // 2, generator=generator)
    pool = pool.mul_(0.02).to(torch.bfloat16)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    weight_map = {}

    def flush() -> None:
        for shard, tensors in shards.items():
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        shards.clear()

    for name, shape in shapes.items():
        layer = name.split(".")[2] if ".layers." in name else "outside"
        shard = f"model-{layer}.safetensors"
        if shard not in shards and layer != "outside":
            flush()
        # Every matrix is another stretch of one long random sequence: drawing each would take longer than measuring.
        start = int(torch.randint(len(pool) - shape.numel() + 1, (), generator=generator))
        values = torch.ones(shape, dtype=pool.dtype) if len(shape) == 1 else pool[start : start + shape.numel()]
        if layer == "outside":
            shard = f"model-{name}.safetensors"
        shards.setdefault(shard, {})[name] = values.clone().view(shape)
        weight_map[name] = shard
    flush()
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return n_bytes


def measure_in_child(folder: Path, args: argparse.Namespace, result: multiprocessing.Queue) -> None:
    """Measure, and report time and peak memory of this process."""
    import evatune
    from evatune.hardware import describe_machine

    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(1)
    batches = [
        {"input_ids": torch.randint(3, 32000, (args.batch_size, args.length), generator=generator)}
        for _ in range(args.batches)
    ]
    started = time.perf_counter()
    spectra = evatune.measure_from_disk(
        folder, batches, rank=args.rank, rho=2.0, max_batches=args.batches, waiting_gib=args.waiting_gib
    )
    result.put(
        {
            "seconds": time.perf_counter() - started,
            "peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
            "targets": len(spectra),
            "inputs": len(spectra.inputs),
            "rows": max(spectrum.n_rows for spectrum in spectra.inputs.values()),
            "backends": sorted({spectrum.backend for spectrum in spectra.inputs.values()}),
            "machine": describe_machine(),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is written and deleted again")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--waiting-gib", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "larger_than_memory.json")
    args = parser.parse_args()
    if sys.platform == "darwin":
        raise SystemExit("peak memory is counted in other units on macOS; run this on Linux.")

    import evatune
    from evatune.hardware import versions_of

    args.folder.mkdir(parents=True, exist_ok=True)
    folder = args.folder / "llama-2-7b-shaped"
    told = None
    try:
        started = time.perf_counter()
        n_bytes = write_checkpoint(folder, args.layers)
        print(f"wrote {n_bytes / GIB:.1f} GiB in {time.perf_counter() - started:.0f} s")
        told = evatune.estimate(
            folder,
            batch_size=args.batch_size,
            length=args.length,
            rank=args.rank,
            max_batches=args.batches,
            weights_dtype=torch.bfloat16,
        )
        print(told.table())
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        child = context.Process(target=measure_in_child, args=(folder, args, queue))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit("the measurement failed.")
        measured = queue.get()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "checkpoint_gib": n_bytes / GIB,
        "settings": {name: getattr(args, name) for name in ("layers", "batches", "batch_size", "length", "rank")},
        "estimate": {
            "states_gib": told.state_bytes / GIB,
            "largest_block_gib": told.block_bytes / GIB,
            "waiting_gib": told.hidden_bytes / GIB,
        },
        **measured,
        "versions": versions_of("evatune", "torch", "transformers", "safetensors"),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"measured {measured['inputs']} inputs on {measured['rows']:,} rows in {measured['seconds']:.0f} s; "
        f"peak resident memory {measured['peak_resident_gib']:.2f} GiB of a {n_bytes / GIB:.1f} GiB checkpoint"
    )


if __name__ == "__main__":
    main()
