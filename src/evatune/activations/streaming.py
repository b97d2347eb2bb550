"""`measure_from_disk`: measure a model that is larger than memory, one block after the other.

The weights are read once. First the part before the blocks runs for every batch; then each block is filled from disk,
all batches pass through it, its inputs are measured, and it is emptied again. What waits between two blocks is one
hidden state per batch, in memory or on disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from evatune.activations.blockwise import BlockwiseRun
from evatune.activations.checkpoint import Checkpoint, StoredWeights
from evatune.activations.empty import empty_model, model_folder, read_config
from evatune.activations.measure import Forward, _autocast, _check_settings, _ranks_of
from evatune.activations.measurement import Measurement, warn_of_errors
from evatune.activations.preserve import measuring_state, preserved_random_state
from evatune.activations.rows import IGNORED_LABEL, RowMasks
from evatune.activations.stopping import BATCH_CAP, EXHAUSTED, StoppingMonitor, StoppingRule
from evatune.activations.targets import TargetModule, TargetRules, find_targets
from evatune.activations.waiting import WaitingTensors
from evatune.errors import EvaError
from evatune.pca import StreamingPCA
from evatune.spectra import Spectra


def measure_from_disk(
    model: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    n_components: int | None = None,
    rank: int | Mapping[str, int] | None = None,
    rho: float = 2.0,
    max_batches: int = 64,
    use_label_mask: bool = False,
    label_mask_value: int = IGNORED_LABEL,
    backend: str = "auto",
    center: bool = True,
    dtype: str | torch.dtype | None = None,
    weights_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    waiting_gib: float = 1.0,
    scratch: str | os.PathLike[str] | None = None,
    task: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    forward: Forward | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Spectra:
    """Measure a stored model without ever holding more than one of its blocks in memory.

    The result is that of `measure` on the loaded model with the same batches and no stopping rule. Rules cannot end
    this measurement: when the first block is measured, all batches have to wait for the last one anyway. So
    `max_batches` (or the end of the data) decides, and `stopped` says so.

    It works for models of transformers that keep their blocks in one `ModuleList` and pass one hidden state from block
    to block: the decoders and encoders of text and vision. Targets before and after the blocks are measured as well.
    Nothing behind the last target is read.

    Args:
        model: folder of a model in safetensors, or a hub id.
        batches: as for `measure`; those that are measured are kept until the end.
        target_modules: as for `measure`, like all settings that are not explained here.
        exclude_modules: what is left out of these.
        layers_to_transform: only layers with these numbers.
        layers_pattern: name of the list of layers.
        n_components: how many components to keep of each input; by default round(rho * rank) for the largest rank,
            or 32 without a rank.
        rank: rank r of the later plan, for all targets or by target name.
        rho: of the later plan.
        max_batches: how many batches to measure.
        use_label_mask: leave out positions whose label the loss ignores.
        label_mask_value: the label that the loss ignores.
        backend: of `StreamingPCA`.
        center: subtract the mean.
        dtype: run under autocast in this dtype, "auto" or None, as in `measure`.
        weights_dtype: dtype of the weights in memory; by default as they are stored.
        device: where blocks run; hidden states wait on the CPU.
        waiting_gib: how many GiB of hidden states and block arguments may wait in memory; the rest waits on disk.
        scratch: folder for what waits on disk, by default the system's for temporary files.
        task: which class of model, as for `evatune.models.load_model`; by default the one in `config.json`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with a hub model.
        forward: calls the model with a batch, where the default does not fit.
        progress: show a bar on standard error.
        seed: of the sketches.

    Returns:
        Spectra by target name. Ctrl-C leaves nothing behind, since blocks behind the present one have seen no row.

    Raises:
        EvaError: as `measure` does; and there is no such model, it is quantized or not in safetensors, a weight is
            missing, or it does not keep its blocks in one list.

    Cost: the forward passes up to the last target, reading the weights once, and writing and reading one hidden state
    per batch and block where they wait on disk. Memory: one block, the states of its inputs, what waits, and one
    batch's activations inside a block.
    """
    n_components = _check_settings(n_components, rank, rho, "ratio", max_batches)
    StreamingPCA(n_components, backend=backend)  # refuses settings before anything is read
    if not waiting_gib >= 0:
        raise EvaError(f"waiting_gib must be a number of at least 0, got {waiting_gib!r}; 0 lets all wait on disk.")
    started = time.perf_counter()
    folder = model_folder(model, revision=revision)
    checkpoint = Checkpoint(folder)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    empty = empty_model(
        config, dtype=weights_dtype or checkpoint.dtype(), task=task, trust_remote_code=trust_remote_code
    )
    rules = TargetRules(
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
    )
    if getattr(empty.config, "is_encoder_decoder", False):
        raise EvaError(
            f"{type(empty).__name__} is an encoder-decoder model, every block of its decoder needs the whole encoder; "
            "load it whole and use `measure`."
        )
    targets = find_targets(empty, rules)
    if isinstance(rank, Mapping):
        rank = _ranks_of([target.name for target in targets], rank)
    device = torch.device(device)
    run = BlockwiseRun(
        model=empty,
        targets=targets,
        blocks=find_blocks(empty, targets),
        weights=StoredWeights(empty, checkpoint, device=device),
        device=device,
        autocast=lambda: _autocast(empty, dtype),
        new_measurement=partial(
            Measurement,
            new_pca=partial(StreamingPCA, backend=backend, center=center, seed=seed, rough_looks=True),
            n_components=n_components,
            monitor=StoppingMonitor(StoppingRule(tau=None, min_gain=None)),
        ),
        masks_of=partial(
            RowMasks.of, encoder_decoder=False, use_label_mask=use_label_mask, label_mask_value=label_mask_value
        ),
        forward=forward,
    )
    bar = tqdm(unit="pass", desc="embedding", disable=not progress, dynamic_ncols=True)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        preserved_random_state(),
        measuring_state(empty),
        WaitingTensors(int(waiting_gib * 2**30), folder=scratch) as waiting,
        bar,
    ):
        run.run(islice(batches, max_batches), waiting, bar)
    stopped = BATCH_CAP if run.n_batches == max_batches else EXHAUSTED
    settings = {
        "target_modules": target_modules if isinstance(target_modules, str) else sorted(target_modules),
        "n_components": n_components,
        "rank": rank,
        "rho": rho,
        "max_batches": max_batches,
        "n_batches": run.n_batches,
        "use_label_mask": use_label_mask,
        "backend": backend,
        "center": center,
        "dtype": str(dtype) if dtype is not None else None,
        "weights_dtype": str(empty.dtype),
        "seed": seed,
        "from_disk": True,
    }
    spectra = Spectra(
        targets={target.name: run.table[target.name] for target in targets if target.name in run.table},
        inputs={
            target.name: replace(run.spectra[target.name], stopped=stopped)
            for target in targets
            if target.name in run.spectra
        },
        model_name=os.fspath(model),
        settings=settings,
        versions={name: metadata.version(name) for name in ("evatune", "torch", "transformers")},
        seconds=time.perf_counter() - started,
    )
    warn_of_errors(spectra.inputs)
    return spectra


def find_blocks(model: nn.Module, targets: Sequence[TargetModule]) -> dict[str, nn.Module]:
    """Return the blocks of a model by name: the elements of the one outermost `ModuleList` that holds targets.

    Raises:
        EvaError: no list holds a target, or several do.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    holding = [name for name in outermost if any(target.name.startswith(name + ".") for target in targets)]
    if len(holding) != 1:
        found = f"targets in {len(holding)} lists of blocks ({', '.join(holding)})" if holding else "no list of blocks"
        raise EvaError(
            f"{type(model).__name__} has {found}, and only models with one can be measured from disk; "
            + ("choose the targets of one list with target_modules, or " if holding else "")
            + "load it whole and use `measure`."
        )
    blocks = {f"{holding[0]}.{name}": block for name, block in model.get_submodule(holding[0]).named_children()}
    n_layers = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    if isinstance(n_layers, int) and n_layers > len(blocks):
        raise EvaError(
            f"{type(model).__name__} runs {n_layers} layers with fewer blocks, so that blocks are used several times; "
            "load it whole and use `measure`."
        )
    return blocks
