"""Models whose parameters are spread over processes: `fully_shard` (FSDP2) and DeepSpeed ZeRO-3.

Every layer of such a model is gathered from all processes right before it runs and released right after. So all
processes must make the same number of passes, and no pass may end early: the other processes would wait forever, and
the gathered parameters would stay in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from evatune.errors import EvaError

FULLY_SHARD = "fully_shard"
ZERO_3 = "ZeRO-3"


def without_engine(model: Any) -> Any:
    """Return the model inside a DeepSpeed engine, whose hooks are on this model; return any other model as it is."""
    engine = _if_loaded("deepspeed.runtime.engine", "DeepSpeedEngine")
    return model.module if engine is not None and isinstance(model, engine) else model


def sharding_of(model: nn.Module) -> str | None:
    """Return what spreads the parameters of a model over processes: `FULLY_SHARD`, `ZERO_3` or None.

    Raises:
        EvaError: it is `FullyShardedDataParallel` (FSDP1) or tensor parallelism, which measuring does not support.
    """
    wrapper = _if_loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    if wrapper is not None and any(isinstance(module, wrapper) for module in model.modules()):
        raise EvaError(
            "a model inside FullyShardedDataParallel (FSDP1) cannot be measured; measure before wrapping it, or shard "
            "it with torch.distributed.fsdp.fully_shard."
        )
    if any(True for _ in _fully_sharded(model)):
        return FULLY_SHARD
    spread = _if_loaded("torch.distributed.tensor", "DTensor")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            return ZERO_3
        if spread is not None and isinstance(parameter, spread):
            raise EvaError(
                f"parameter {name!r} is a DTensor of a model that fully_shard has not sharded; a model under tensor "
                "parallelism cannot be measured, measure before it is parallelized."
            )
    return None


@contextmanager
def sharded_again(model: nn.Module) -> Iterator[None]:
    """Release gathered parameters on exit: after a pass, `fully_shard` keeps the outermost ones for a backward pass."""
    try:
        yield
    finally:
        for module in _fully_sharded(model):
            module.reshard()


def _fully_sharded(model: nn.Module) -> Iterator[Any]:
    kinds = [
        kind
        for place in ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")  # the latter before torch 2.6
        if (kind := _if_loaded(place, "FSDPModule")) is not None
    ]
    return (module for module in model.modules() if isinstance(module, tuple(kinds)))


def _if_loaded(module: str, name: str) -> Any:
    """Return a class if its module was imported, else None: then no object of this class exists."""
    return getattr(sys.modules.get(module), name, None)
