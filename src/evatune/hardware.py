"""What this machine is."""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from evatune.pca.products import has_fast_bfloat16


def versions_of(*names: str) -> dict[str, str]:
    """Return the versions of packages; this one may be on the path only, without being installed."""
    own = {"evatune": import_module("evatune").__version__}
    return {name: own.get(name) or metadata.version(name) for name in names}


def best_device() -> torch.device:
    """Return the accelerator of this machine, or its processor."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, dtype: str | None) -> AbstractContextManager[Any]:
    """Return the context in which a forward pass computes in another dtype than that of the weights.

    Args:
        device: where it runs.
        dtype: name of a float dtype; `auto` is bfloat16 where the device computes it fast; None changes nothing.
    """
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bfloat16(device.type) else None
    return nullcontext() if dtype is None else torch.autocast(device.type, getattr(torch, dtype))


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, threads, memory and accelerators, as the run record keeps them."""
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory,
        "gpus": gpus,
        "fast_bf16": has_fast_bfloat16(best_device().type),
    }


def reset_peak_memory() -> None:
    """Forget the most memory that this process held so far, where the system can (Linux, CUDA)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float | None:
    """Return the most memory that was allocated on the accelerator, or else that this process held."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    kib = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), None)
    return round(int(kib) / 2**20, 3) if kib else None


def _cpu_model() -> str:
    """Return the processor's name; the platform module knows only its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
