"""Hooks that hand the input of every target to a consumer, once per tensor, and end the pass after the last one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from evatune.activations.sharing import SeenTensors
from evatune.activations.targets import TargetModule

Consumer = Callable[[str, Tensor], None]


class _LastInputSeen(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Every input of this pass was handed over; what remains of the model is not needed."""


class Capture:
    """Hooks on the targets of a model, for as long as the `with` block lasts.

    The first pass is the probe: it runs to the end and learns which targets share their inputs, and which input comes
    last. From then on only the first target of each shared input is hooked, and every pass ends where the last of them
    was entered, so that neither the head nor the loss is computed. Targets that the probe did not reach (experts that
    got no token) stay hooked, and passes run to the end while there are any.

    Attributes:
        input_of: for every target reached so far, the key of its input: the name of the first target that got it.
    """

    def __init__(self, targets: Sequence[TargetModule], consumer: Consumer) -> None:
        self.targets = targets
        self.consumer = consumer
        self.input_of: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        self._last_call: int | None = None
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._seen = SeenTensors()
        self._calls: Counter[str] = Counter()
        self._numbers: dict[str, list[int]] = {}
        self._owners: dict[int, str] = {}

    def __enter__(self) -> Capture:
        for target in self.targets:
            hook = self._make_hook(target.name)
            self._handles[target.name] = target.module.register_forward_pre_hook(hook, with_kwargs=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def run(self, forward: Callable[[], Any]) -> bool:
        """Make one pass.

        Args:
            forward: calls the model.

        Returns:
            False if what the consumer got must be forgotten and the pass be made again: the probe has shown that some
            targets share only some of their inputs.
        """
        self._begin_pass()
        try:
            forward()
        except _LastInputSeen:
            return True
        return self._learn_from_full_pass()

    def _make_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            activation = args[0] if args else next(iter(kwargs.values()))
            self._calls[name] += 1
            if name in self.input_of:
                if self.input_of[name] == name:
                    self.consumer(name, activation)
            else:
                number, new = self._seen.number(activation)
                self._numbers.setdefault(name, []).append(number)
                if new:
                    self._owners[number] = name
                    self.consumer(name, activation)
            if self._calls.total() == self._last_call:
                raise _LastInputSeen

        return hook

    def _learn_from_full_pass(self) -> bool:
        """Group the targets whose tensors were the same in every call, and unhook all but the first of each group."""
        first_of: dict[tuple[int, ...], str] = {}
        regular = True
        for name, numbers in self._numbers.items():
            self.input_of[name] = first_of.setdefault(tuple(numbers), name)
            regular &= all(self._owners[number] == self.input_of[name] for number in numbers)
        for name, key in self.input_of.items():
            if key != name and name in self._handles:
                self._handles.pop(name).remove()
        everything_reached = len(self.input_of) == len(self.targets)
        self._last_call = sum(self._calls[name] for name in self._handles) if everything_reached else None
        return regular
