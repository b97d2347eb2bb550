"""Leave a model and the random number generators as they were found, whatever happens in between."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from evatune.errors import EvaError


def random_state() -> Callable[[], None]:
    """Return a function that puts the generators of Python, NumPy and torch (all devices) back to this state."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if device_states:
            torch.cuda.set_rng_state_all(device_states)

    return restore


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the generators of Python, NumPy and torch (all devices) on exit."""
    restore = random_state()
    try:
        yield
    finally:
        restore()


def uncompiled(model: Any) -> AbstractContextManager[Any]:
    """Run compiled parts of a model without compilation: code compiled before the hooks were set does not call them."""
    modules = list(model.modules())
    compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules)
    if not compiled or not hasattr(torch.compiler, "set_stance"):  # torch < 2.6
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


_REPACKS = "support_avx512bf16_for_cpu"
"""If this attribute is set, bitsandbytes repacks 4-bit weights in evaluation mode; then they pass no gradient."""


@contextmanager
def measuring_state(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without cache and with its adapters switched off; restore each part on exit.

    Adapters are switched by the flag alone: PEFT's own `disable_adapter` also rewrites which parameters require
    gradients.

    Raises:
        EvaError: an adapter is merged into the weights, so the base model's activations cannot be
            computed.
    """
    modules: list[Any] = list(model.modules())
    merged = [module for module in modules if hasattr(module, "_disable_adapters") and getattr(module, "merged", False)]
    if merged:
        raise EvaError(
            f"adapters are merged into {len(merged)} layers of the model; call unmerge_adapter() before measuring."
        )
    training = [(module, module.training) for module in modules]
    adapters = [(module, module._disable_adapters) for module in modules if hasattr(module, "_disable_adapters")]
    packing = [(module, module.support_avx512bf16_for_cpu) for module in modules if hasattr(module, _REPACKS)]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    caches = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    try:
        # torch's fast path in evaluation mode computes a whole encoder layer at once and calls no module inside it.
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in packing:
            setattr(module, _REPACKS, False)
        model.eval()
        for module, _ in adapters:
            module._disable_adapters = True
        for config, _ in caches:
            config.use_cache = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for module, repacks in packing:
            setattr(module, _REPACKS, repacks)
        for module, mode in training:
            module.training = mode
        for module, disabled in adapters:
            module._disable_adapters = disabled
        for config, use_cache in caches:
            config.use_cache = use_cache
