"""Measuring in many processes: each passes its own batches, and only small matrices are exchanged.

Every process follows its rows with its own `StreamingPCA`. At checks (after 1, 2, 4, 8, … steps and at the end) the
states are refreshed, gathered and merged: d x l numbers per input and process, whatever the number of rows, where
gathering activations would send n x d. Every process merges the same states in the same order, so that
all end with the same bits on equal hardware.

Processes walk in lockstep from check to check. One that has run out of data, or never had any, keeps taking part; one
that fails says so at the next check, and then all end with an error: none waits for a process that is gone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evatune.activations.layers import AnyPCA
from evatune.activations.measurement import Measurement
from evatune.activations.stopping import BATCH_CAP, EXHAUSTED, INTERRUPTED
from evatune.errors import EvaError
from evatune.pca import StreamingPCA
from evatune.pca.one_hot import OneHotPCA


class Ranks:
    """The processes of the default group, and what this one has sent them.

    Attributes:
        rank: the number of this process.
        size: how many there are.
        bytes_sent: what this process contributed to all exchanges.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.bytes_sent = 0
        # What is exchanged goes over the processor for gloo and over the accelerator for the others.
        on_cpu = dist.get_backend() in ("gloo", "mpi")
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    @staticmethod
    def present() -> bool:
        """Tell whether there is more than one process."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which must have equal shapes and dtypes."""
        tensor = tensor.to(self.device).contiguous()
        everyone = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(everyone, tensor)
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return everyone

    def gather_json(self, value: Any) -> list[Any]:
        """Return what all processes gave; of any length, and never unpickled."""
        text = json.dumps(value).encode()
        lengths = [int(length) for length in self.gather(torch.tensor([len(text)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts = self.gather(padded)
        return [json.loads(bytes(text[:length].tolist()).decode()) for text, length in zip(texts, lengths, strict=True)]

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes, the same in each."""
        return torch.stack(self.gather(tensor)).sum(dim=0).to(tensor.device)


def drive(
    passes: Iterator[int], measurement: Measurement, ranks: Ranks, *, max_batches: int, bar: Any
) -> tuple[int, str]:
    """Walk through the batches of this process in lockstep with the others, merging and checking where they meet.

    Args:
        passes: passes one batch at each `next`, and says how many there were.
        measurement: of this process; at the end it holds the merged states, the same in every process.
        ranks: the processes.
        max_batches: the most batches that one process passes.
        bar: the progress bar.

    Returns:
        How many batches all processes have passed together, and why measuring ended.

    Raises:
        EvaError: another process has failed. What this process itself raised is raised again.
    """
    n_steps, n_passed, running, interrupted = 0, 0, True, False
    failure: BaseException | None = None
    own = measurement.pcas
    while True:
        if _is_meeting(n_steps) or n_steps == max_batches:
            facts = ranks.gather_json([running, failure is not None, interrupted, n_passed, measurement.input_of])
            failed = [rank for rank, fact in enumerate(facts) if fact[1]]
            if failure is not None:
                raise failure
            if failed:
                raise EvaError(f"process {failed[0]} failed while measuring, so all end; its own message says why.")
            measurement.monitor.pool(ranks.add)
            merged = _merge(own, _agreed([fact[4] for fact in facts]), ranks)
            measurement.adopt(*merged, n_batches=sum(fact[3] for fact in facts))
            bar.set_postfix_str(measurement.progress_text())
            n_batches = sum(fact[3] for fact in facts)
            if any(fact[2] for fact in facts):
                return n_batches, INTERRUPTED
            if n_steps == max_batches or measurement.all_done():
                return n_batches, BATCH_CAP
            if not any(fact[0] for fact in facts):
                return n_batches, EXHAUSTED
        if running:
            measurement.pcas = own
            try:
                n_passed = next(passes)
                bar.update()
            except StopIteration:
                running = False
            except KeyboardInterrupt:
                running, interrupted = False, True
            except Exception as error:
                running, failure = False, error
        n_steps += 1


def _is_meeting(n_steps: int) -> bool:
    """Tell whether processes meet after so many steps: 1, 2, 4, 8, …"""
    return n_steps > 0 and n_steps & (n_steps - 1) == 0


def _agreed(tables: list[dict[str, str]]) -> dict[str, str]:
    """Return which target has which input, as the processes that reached it found."""
    agreed: dict[str, str] = {}
    for table in tables:
        for name, key in table.items():
            if agreed.setdefault(name, key) != key:
                raise EvaError(
                    f"the processes disagree on which targets share the input of {name!r}; give all the same model."
                )
    return agreed


def _merge(
    local: Mapping[str, AnyPCA], input_of: dict[str, str], ranks: Ranks
) -> tuple[dict[str, str], dict[str, AnyPCA]]:
    """Return the table of inputs and the merged state of each, the same in all processes."""
    states = {key: pca.refresh().state_dict() for key, pca in local.items() if pca.is_fitted}
    layouts = {
        key: {name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in state.items()}
        for key, state in states.items()
    }
    layout_of: dict[str, Any] = functools.reduce(lambda known, layout: layout | known, ranks.gather_json(layouts), {})
    merged = {}
    for key in dict.fromkeys(input_of.values()):
        if key not in layout_of:
            continue
        layout = layout_of[key]
        absent = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in layout.items()}
        gathered = {name: ranks.gather(states.get(key, absent)[name]) for name in sorted(layout)}
        present = [
            {name: tensors[rank] for name, tensors in gathered.items()}
            for rank in range(ranks.size)
            if int(gathered["n_samples_seen"][rank])
        ]
        pcas: list[Any] = [_restored(state) for state in present]
        merged[key] = functools.reduce(lambda first, second: first.merge(second), pcas)
    return input_of, merged


def _restored(state: dict[str, Tensor]) -> AnyPCA:
    if "counts" in state:
        return OneHotPCA.from_state_dict(state)
    pca = StreamingPCA(int(state["n_components"]), center=bool(state["center"]))
    return pca.load_state_dict(state)
