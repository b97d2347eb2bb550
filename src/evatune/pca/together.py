"""Many algorithms side by side: their matrices are factorized together, and their numbers reach the host together.

Shapes: m rows and columns of a small matrix, d rows of a tall one.

On an accelerator, factorizing a small matrix takes as long as thousands of products, reading one number stalls the
device, and each operation takes some microseconds of the host. So an algorithm with any of these is written as a
generator: it reads as if it were alone, and where it needs a matrix factorized, a number on the host, or a function of
its tensors, it yields a request and continues with the answer. `together` runs many of them and answers the requests
of one kind and shape at once, in one stack. On the CPU it is the same code: there the algorithms are spread over the
threads, and each thread runs a few of them side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from evatune.pca.parking import OWN_MEMORY
from evatune.pca.products import unrounded
from evatune.pca.threads import on_one_thread_each, one_thread

T = TypeVar("T")

Steps = Generator["Request", Any, T]
"""An algorithm that yields requests and returns a T."""

PROCESSOR_BYTES = 16 * 1024**2
"""Upper bound of the working memory of all algorithms that run side by side on one thread of the CPU. More would not
fit in its caches and would cost more than it gains. At least one runs."""

ACCELERATOR_BYTES = 256 * 1024**2
"""The same bound on an accelerator: enough for 15 sketches of 4,096 features and 32 components."""


ONE_BY_ONE = TorchVersion(torch.__version__) < TorchVersion("2.12")
"""Whether torch decomposes the matrices of a stack one by one on CUDA from `ONE_BY_ONE_FROM` columns on, at some
milliseconds each (its issues 174674 and 175585). The threads of the host do so side by side."""
ONE_BY_ONE_FROM = 33
ON_HOST_UP_TO = 512
"""Wider matrices are left to the card all the same. Chosen, not measured."""


class Request(ABC):
    """What an algorithm asks for."""

    makes_wait: ClassVar[bool] = False
    """Whether the host waits for the answer on an accelerator."""

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Requests with equal keys are answered at once."""

    @classmethod
    @abstractmethod
    def answers(cls, requests: Sequence[Self]) -> Iterable[Any]:
        """Return the answers to requests of one key, in their order."""


@dataclass(frozen=True)
class Host(Request):
    """The entries of a small tensor as a list of floats."""

    tensor: Tensor
    makes_wait = True

    @property
    def key(self) -> Hashable:
        """Requests with equal keys are answered at once; their shapes may differ."""
        return Host, self.tensor.device

    @classmethod
    def answers(cls, requests: Sequence[Self]) -> Iterable[list[float]]:
        """Return the entries."""
        wide = torch.float32 if requests[0].tensor.device.type == "mps" else torch.float64
        flat = [request.tensor.reshape(-1) for request in requests]
        numbers = torch.cat(flat).to(wide).tolist()
        start = 0
        for tensor in flat:
            yield numbers[start : start + len(tensor)]
            start += len(tensor)


@dataclass(frozen=True, eq=False)
class Batched(Request):
    """What a function returns for these tensors, a tuple of tensors; made by `batched`.

    An accelerator gets it for a stack: the function must take tensors with one more dimension in front.
    """

    function: Callable[..., tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]
    settings: tuple[tuple[str, Hashable], ...]

    @property
    def key(self) -> Hashable:
        """Requests with equal keys are answered at once."""
        return self.function, self.settings, *((one.shape, one.dtype, one.device) for one in self.tensors)

    @classmethod
    def answers(cls, requests: Sequence[Self]) -> Iterable[tuple[Tensor, ...]]:
        """Call the function once for all; on a CPU, where stacking would only be a copy, once for each."""
        function = partial(requests[0].function, **dict(requests[0].settings))
        if len(requests) == 1 or requests[0].tensors[0].device.type in OWN_MEMORY:
            return [function(*request.tensors) for request in requests]
        found = function(*(torch.stack(alike) for alike in zip(*(one.tensors for one in requests), strict=True)))
        return zip(*(stack.unbind() for stack in found), strict=True)


def batched(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, **settings: Hashable) -> Batched:
    """Return the request for a function of tensors; only those of equal settings are answered at once."""
    return Batched(function, tensors, tuple(settings.items()))


@dataclass(frozen=True)
class _Factorization(Request):
    tensor: Tensor

    @property
    def key(self) -> Hashable:
        """Requests with equal keys are answered at once."""
        return type(self), self.tensor.shape, self.tensor.dtype, self.tensor.device

    @classmethod
    def answers(cls, requests: Sequence[Self]) -> Iterable[Any]:
        """Factorize all matrices in one stack, or on the host one on each thread."""
        device = requests[0].tensor.device
        stack = torch.stack([request.tensor for request in requests])
        if cls.is_for_host(device.type, stack.shape[-1]):
            factors = zip(*on_one_thread_each(cls.factorized, stack.cpu()), strict=True)
            return zip(*(torch.stack(of_all).to(device) for of_all in factors), strict=True)
        with one_thread():
            return zip(*cls.factorized(stack), strict=True)

    @classmethod
    def is_for_host(cls, device_type: str, size: int) -> bool:
        """Tell whether the host factorizes matrices of this kind of device and of this many columns."""
        return device_type == "mps"  # which has no factorizations

    @staticmethod
    @abstractmethod
    def factorized(stack: Tensor) -> tuple[Tensor, ...]:
        """Return the factors of a matrix, or of a stack of matrices."""


class Eigh(_Factorization):
    """Eigenvalues (m,), ascending, and eigenvectors in columns (m, m), of a symmetric matrix. Cost O(m³)."""

    @classmethod
    def is_for_host(cls, device_type: str, size: int) -> bool:
        """Tell whether the host decomposes matrices of this kind of device and of this size, see `ONE_BY_ONE`."""
        is_slow = ONE_BY_ONE and device_type == "cuda" and ONE_BY_ONE_FROM <= size <= ON_HOST_UP_TO
        return is_slow or super().is_for_host(device_type, size)

    @staticmethod
    def factorized(stack: Tensor) -> tuple[Tensor, ...]:
        """Return eigenvalues and eigenvectors."""
        return torch.linalg.eigh(stack)


class Orthonormal(_Factorization):
    """Orthonormal columns (d, m) with the span of the columns of a tall matrix, and R (m, m). Cost O(d m²)."""

    @staticmethod
    def factorized(stack: Tensor) -> tuple[Tensor, ...]:
        """Return the factors of a QR decomposition."""
        return torch.linalg.qr(stack)


class InverseRoot(_Factorization):
    """R, (m, m) upper triangular, with R Rᵀ = C⁻¹ for a positive matrix C, and its least pivot, zero if there is none.

    Cost O(m³).
    """

    @staticmethod
    def factorized(stack: Tensor) -> tuple[Tensor, ...]:
        """Return roots and pivots."""
        lower, failed = torch.linalg.cholesky_ex(stack)
        pivots = lower.diagonal(dim1=-2, dim2=-1).square().amin(dim=-1)
        eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
        roots = torch.linalg.solve_triangular(lower.mT, eye.expand_as(stack), upper=True)
        return roots, torch.where(failed == 0, pivots, 0.0)


@dataclass(frozen=True)
class Work:
    """An algorithm that is to be run, perhaps beside others."""

    steps: Steps[Any]
    n_bytes: int = 0
    """Bytes of its working memory."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device of that memory."""


class Task(Enum):
    """Kinds of work that a streaming PCA has left after rows were added."""

    SETTLE = "the work that adding rows has left"
    REFRESH = "folding all rows in, so that the state is at its smallest"
    SNAPSHOT = "components good enough to watch them"
    LEARN = "components"


def alone(steps: Steps[T]) -> T:
    """Run one algorithm and return its result."""
    (result,) = together([Work(steps)])
    return result  # type: ignore[no-any-return]


def together(works: Iterable[Work]) -> list[Any]:
    """Run algorithms side by side, as many at a time as their memory bound allows, and return their results.

    Raises:
        Exception: the exception of the first that fails; those that run beside it are closed then.
    """
    works = list(works)
    portions = list(_portions(works))
    on_processor = all(work.device.type == "cpu" for work in works)
    with unrounded(*(work.device for work in works)):
        if on_processor and len(portions) > 1:
            results = on_one_thread_each(_run, portions)
        else:
            results = [_run(portion) for portion in portions]
    return [result for portion in results for result in portion]


def _portions(works: Iterable[Work]) -> Iterator[list[Work]]:
    """Yield the works that run side by side."""
    portion: list[Work] = []
    n_bytes = 0
    for work in works:
        limit = PROCESSOR_BYTES if work.device.type == "cpu" else ACCELERATOR_BYTES
        if portion and n_bytes + work.n_bytes > limit:
            yield portion
            portion, n_bytes = [], 0
        portion.append(work)
        n_bytes += work.n_bytes
    if portion:
        yield portion


@torch.no_grad()
def _run(works: Sequence[Work]) -> list[Any]:
    """Run algorithms side by side and return their results."""
    results: list[Any] = [None] * len(works)
    waiting: dict[int, Request] = {}

    def advance(number: int, answer: Any) -> None:
        try:
            waiting[number] = works[number].steps.send(answer)
        except StopIteration as end:
            results[number] = end.value
            waiting.pop(number, None)

    try:
        for number in range(len(works)):
            advance(number, None)
        while waiting:
            groups: dict[Hashable, list[int]] = {}
            for number, request in waiting.items():
                groups.setdefault(request.key, []).append(number)
            # The host waits last, when as many algorithms as possible want it to.
            must_wait = all(request.makes_wait for request in waiting.values())
            for numbers in groups.values():
                if waiting[numbers[0]].makes_wait and not must_wait:
                    continue
                requests = [waiting[number] for number in numbers]
                for number, answer in zip(numbers, list(type(requests[0]).answers(requests)), strict=True):
                    advance(number, answer)
    finally:
        for work in works:
            work.steps.close()
    return results
