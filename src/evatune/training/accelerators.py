"""Accelerators by name, with the numbers of their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from evatune.errors import EvaError, near_misses


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of card."""

    name: str
    """What `--on` calls it."""
    gigabytes: int
    """Memory in units of 10^9 bytes."""
    bf16_teraflops: float
    """Peak of dense matrix products in bfloat16, in units of 10^12 operations a second."""
    source: str
    """The data sheet."""

    @property
    def memory_bytes(self) -> int:
        """Its memory."""
        return self.gigabytes * 10**9


ACCELERATORS: dict[str, Accelerator] = {
    card.name: card
    for card in (
        Accelerator(
            name="a100-40gb", gigabytes=40, bf16_teraflops=312, source="NVIDIA A100 Tensor Core GPU data sheet (2021)"
        ),
        Accelerator(
            name="a100-80gb", gigabytes=80, bf16_teraflops=312, source="NVIDIA A100 Tensor Core GPU data sheet (2021)"
        ),
        Accelerator(
            name="h100-80gb",
            gigabytes=80,
            bf16_teraflops=989,
            source="NVIDIA H100 Tensor Core GPU data sheet (SXM; 1,979 with sparsity)",
        ),
        Accelerator(
            name="h200-141gb",
            gigabytes=141,
            bf16_teraflops=989,
            source="NVIDIA H200 Tensor Core GPU data sheet (SXM; 1,979 with sparsity)",
        ),
        Accelerator(
            name="l40s-48gb",
            gigabytes=48,
            bf16_teraflops=362,
            source="NVIDIA L40S data sheet (733 with sparsity)",
        ),
        Accelerator(
            name="l4-24gb",
            gigabytes=24,
            bf16_teraflops=121,
            source="NVIDIA L4 Tensor Core GPU data sheet (242 with sparsity)",
        ),
        Accelerator(
            name="a10-24gb", gigabytes=24, bf16_teraflops=125, source="NVIDIA A10 Tensor Core GPU data sheet (2021)"
        ),
    )
}
"""All by name."""


def find_accelerator(name: str) -> Accelerator:
    """Return an accelerator by its name.

    Raises:
        EvaError: there is none of this name.
    """
    if name not in ACCELERATORS:
        raise EvaError(
            f"there is no accelerator {name!r}{near_misses(name, ACCELERATORS)}; known are {', '.join(ACCELERATORS)}."
        )
    return ACCELERATORS[name]
