"""What this machine is, and whether it computes bfloat16 fast."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch


def has_fast_bf16() -> bool:
    """Return whether products in bfloat16 are faster here than in float32.

    A GPU must support the type; a processor must have instructions for it (AMX or AVX-512 BF16 on x86, BF16 on ARM).
    Without them PyTorch emulates bfloat16, many times slower than float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return False
    return bool(_cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16", "svebf16"})


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
        "fast_bf16": has_fast_bf16(),
    }


def _cpu_info() -> dict[str, str]:
    """Return the first entry of each field of /proc/cpuinfo; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    info: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        info.setdefault(name.strip(), value.strip())
    return info


def _cpu_flags() -> set[str]:
    info = _cpu_info()
    return set((info.get("flags") or info.get("Features") or "").split())


def _cpu_model() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()
