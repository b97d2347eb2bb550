"""Single operations on a device: what adding rows is made of, what it could be made of, and what a refresh waits for.

A part of `benchmarks/accelerator.py`. Shapes: n rows, d features, m columns of a sketch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch

from evatune import StreamingPCA
from evatune.pca.moments import Moments
from evatune.pca.products import accumulate_product, unrounded
from evatune.pca.together import InverseRoot
from evatune.pca.widths import N_PROBES, sketch_width

N_MATRICES = 4
"""So many matrices of rows take turns, so that the cache does not hold the next one."""
REPEATS = 16
Operation = Callable[[], Any]


def of_rows(n: int, d: int, device: torch.device) -> Iterator[tuple[str, Operation]]:
    """Yield the operations of adding rows in bfloat16 to a sketch, by name; some exist on CUDA only."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(n, d, generator=generator).to(device, torch.bfloat16) for _ in range(N_MATRICES)]
    turn = cycle(matrices)
    moments = Moments.about(matrices[0], center=True)
    columns = torch.randn(d, sketch_width(32, d) + N_PROBES, generator=generator).to(device, torch.bfloat16)
    projected = matrices[0] @ columns
    sums = torch.zeros_like(columns, dtype=torch.float32)
    pca = StreamingPCA(32, backend="sketch", product_dtype=torch.bfloat16, tolerance=None).partial_fit(matrices[0])

    def product() -> None:
        with unrounded(device):
            accumulate_product(sums, next(turn).T, projected)

    yield "add", lambda: pca.add(next(turn))
    yield "shift", lambda: moments.shifted(next(turn), wanted=torch.bfloat16)
    yield "shift, wider", lambda: moments.shifted(next(turn), wanted=torch.float32)
    yield "moments", lambda: moments.with_rows(next(turn))
    yield "project", lambda: next(turn) @ columns
    yield "project, wider", lambda: torch.mm(next(turn), columns, out_dtype=torch.float32)
    yield "accumulate", product
    yield "accumulate, wider", lambda: torch.addmm(sums, next(turn).T, projected, out_dtype=torch.float32)
    yield "moments by torch.batch_norm_stats", lambda: torch.batch_norm_stats(next(turn), 0.0)


def of_stack(n_matrices: int, size: int, device: torch.device) -> Iterator[tuple[str, Operation]]:
    """Yield the operations on a stack of small matrices that a refresh needs beside eigendecompositions."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(n_matrices, size, 2 * size, generator=generator, dtype=torch.float64).to(device)
    stack = factors @ factors.mT
    yield "product", lambda: stack @ stack
    yield "Cholesky", lambda: torch.linalg.cholesky_ex(stack)
    yield "inverse root", lambda: InverseRoot.factorized(stack)
    yield "to the host and back", lambda: stack.cpu().to(device)


def times(operations: Iterator[tuple[str, Operation]], wait: Operation) -> dict[str, dict[str, float] | str]:
    """Return by name the seconds an operation takes, and those after which the host goes on; or why it failed."""
    found: dict[str, dict[str, float] | str] = {}
    for name, operation in operations:
        try:
            operation()
            wait()
            started = time.perf_counter()
            for _ in range(REPEATS):
                operation()
            host = time.perf_counter() - started
            wait()
            found[name] = {"seconds": (time.perf_counter() - started) / REPEATS, "host_seconds": host / REPEATS}
        except (RuntimeError, TypeError) as error:  # this kind of device, or this version of torch, has it not
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found
