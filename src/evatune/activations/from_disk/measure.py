"""`measure_from_disk`: measure a model that is larger than memory, one block after the other.

The weights are read once. First the part before the blocks runs for every batch; then each block is filled from disk,
all batches pass through it, its inputs are measured, and it is emptied again. Between two blocks, one hidden
state per batch waits in memory or on disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from evatune.activations.batches import is_encoder_decoder, reader_of
from evatune.activations.from_disk.blockwise import BlockwiseRun
from evatune.activations.from_disk.checkpoint import Checkpoint, StoredWeights
from evatune.activations.from_disk.empty import empty_model, model_folder, read_config
from evatune.activations.from_disk.waiting import WaitingTensors
from evatune.activations.layers.targets import TargetModule, TargetRules, find_targets
from evatune.activations.measure import Forward, pca_maker, with_ranks_of
from evatune.activations.preserve import measuring_state, preserved_random_state
from evatune.activations.results import warn_of
from evatune.activations.run import Run
from evatune.errors import EvaError
from evatune.hardware import autocast, versions_of
from evatune.settings import Measuring, Stopping, takes
from evatune.spectra import Spectra

_RULES = ("tau", "delta", "min_gain", "metric", "budget", "train_a")
"""Options of `measure` that only its stopping rules need; measuring from disk has no such rules."""


@takes(Measuring, without=_RULES)
def measure_from_disk(
    model: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    weights_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    waiting_gib: float = 1.0,
    scratch: str | os.PathLike[str] | None = None,
    head: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    forward: Forward | None = None,
    progress: bool = True,
    settings: Measuring | None = None,
    **options: Any,
) -> Spectra:
    """Measure a stored model without ever holding more than one of its blocks in memory.

    The result is that of `measure` on the loaded model with the same batches and no stopping rule. Rules cannot end
    this measurement, since the first block is measured on all batches before the second block runs. So `max_batches`
    or the end of the data ends it, and `stopped` says which.

    It works for models of transformers that keep their blocks in one `ModuleList` and pass one hidden state from block
    to block: the decoders and encoders of text and vision. Targets before and after the blocks are measured as well.
    No weight after the last target is read.

    Args:
        model: folder of a model in safetensors, or a hub id.
        batches: as for `measure`; those that are measured are kept until the end.
        weights_dtype: dtype of the weights in memory; by default as they are stored.
        device: where blocks run; hidden states wait on the CPU.
        waiting_gib: how many GiB of hidden states and block arguments may wait in memory; the rest waits on disk.
        scratch: folder for what waits on disk, by default the system's for temporary files.
        head: which class of model, as for `evatune.models.load_model`; by default the one in `config.json`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with a hub model.
        forward: calls the model with a batch; needed if the default does not fit.
        progress: show a bar on standard error.
        settings: all options in one object; the options below change it. Its stopping rules are not looked at.
        options: see the list below.

    Returns:
        Spectra by target name. After Ctrl-C there are none, since the blocks after the present one have seen no row.

    Raises:
        EvaError: as `measure` does; and there is no such model, it is quantized or not in safetensors, a weight is
            missing, or it does not keep its blocks in one list.

    Cost: the forward passes up to the last target, reading the weights once, and writing and reading one hidden state
    per batch and block where they wait on disk. Memory: one block, the states of its inputs, what waits, and one
    batch's activations inside a block.
    """
    settings = _checked(settings, options)
    if not waiting_gib >= 0:
        raise EvaError(f"waiting_gib must be a number of at least 0, got {waiting_gib!r}; 0 puts everything on disk.")
    started = time.perf_counter()
    folder = model_folder(model, revision=revision)
    checkpoint = Checkpoint(folder)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    empty = empty_model(
        config, dtype=weights_dtype or checkpoint.dtype(), head=head, trust_remote_code=trust_remote_code
    )
    targets = find_targets(empty, settings.part(TargetRules))
    settings = with_ranks_of(settings, [target.name for target in targets])
    device = torch.device(device)
    blockwise = BlockwiseRun(
        model=empty,
        targets=targets,
        blocks=find_blocks(empty, targets),
        weights=StoredWeights(empty, checkpoint, device=device),
        device=device,
        autocast=partial(autocast, device, settings.dtype),
        new_run=partial(
            Run, new_pca=pca_maker(settings), n_components=settings.n_kept, rule=Stopping(tau=None, min_gain=None)
        ),
        n_components=settings.n_kept,
        max_batches=settings.max_batches,
        read=reader_of(empty, use_label_mask=settings.use_label_mask),
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
        blockwise.run(batches, waiting, bar)
    kept = settings.to_json() | {
        "n_components": settings.n_kept,
        "n_batches": blockwise.n_batches,
        "weights_dtype": str(empty.dtype),
        "from_disk": True,
    }
    spectra = Spectra(
        targets={target.name: blockwise.table[target.name] for target in targets if target.name in blockwise.table},
        inputs={target.name: blockwise.spectra[target.name] for target in targets if target.name in blockwise.spectra},
        model_name=os.fspath(model),
        settings=kept,
        versions=versions_of("evatune", "torch", "transformers"),
        seconds=time.perf_counter() - started,
        weights=blockwise.sampled,
        unreached=tuple(target.name for target in targets if target.name not in blockwise.table),
    )
    warn_of(spectra, reached=blockwise.reached)
    return spectra


def _checked(settings: Measuring | None, options: dict[str, Any]) -> Measuring:
    """Return the settings, after every check that needs no model.

    Raises:
        EvaError: an option is unknown, out of range, or only for stopping rules.
    """
    for name in _RULES:
        if name in options:
            raise EvaError(f"{name} cannot be given to evatune.measure_from_disk: only max_batches ends it.")
    settings = Measuring.of(options, settings=settings, call="evatune.measure_from_disk")
    pca_maker(settings)(settings.n_kept)
    return settings


def find_blocks(model: nn.Module, targets: Sequence[TargetModule]) -> dict[str, nn.Module]:
    """Return the blocks of a model by name: the elements of the one outermost `ModuleList` that holds targets.

    Raises:
        EvaError: no list holds a target, or several do, or a block needs more than the one before it.
    """
    if is_encoder_decoder(model):
        raise EvaError(
            f"{type(model).__name__} is an encoder-decoder model, every block of its decoder needs the whole encoder; "
            "load it whole and use `measure`."
        )
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
