"""Hooks that hand the input of every target to a consumer, once per tensor, and end the pass after the last one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from evatune.activations.layer_type import LayerType
from evatune.activations.layers.targets import TargetModule
from evatune.activations.sharing import SeenTensors

Consumer = Callable[[str, Any], None]


class _LastInputSeen(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Every input of this pass was handed over; what remains of the model is not needed."""


class Capture:
    """Hooks on the targets of a model, for as long as the `with` block lasts.

    The first pass is the probe: it runs to the end and learns which targets share their inputs, and which input comes
    last. From then on only the first target of each shared input is hooked, and every pass ends where the last of them
    was entered, so that neither the head nor the loss is computed. Targets that the probe did not reach (experts that
    got no token) stay hooked, each for itself, and all passes run to the end then. They also do so from the moment on
    that a pass calls the targets another number of times than the probe did.

    Args:
        targets: what to hook.
        consumer: takes the name of the first target of a shared input, and the input.
        to_the_end: let every pass run to its end, because its output is wanted.
        unbroken: let no pass end before its end, whatever happens in the hooks, because other processes take part in
            it: what they raise is raised after the pass.

    Attributes:
        input_of: for every target reached so far, the key of its input: the name of the first target that got it.
        broken: an unbroken pass has ended in the middle all the same, because the model itself failed.
    """

    def __init__(
        self,
        targets: Sequence[TargetModule],
        consumer: Consumer,
        *,
        to_the_end: bool = False,
        unbroken: bool = False,
    ) -> None:
        self.targets = targets
        self.consumer = consumer
        self.to_the_end = to_the_end or unbroken
        self.unbroken = unbroken
        self.input_of: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        self._expected_calls: Counter[str] | None = None
        self._probed = False
        self._idle = False
        self.broken = False
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._held: Exception | None = None
        self._seen = SeenTensors()
        self._calls: Counter[str] = Counter()
        self._numbers: dict[str, list[Hashable]] = {}
        self._owners: dict[Hashable, str] = {}

    def __enter__(self) -> Capture:
        for target in self.targets:
            hook = self._make_hook(target.name, target.layer)
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
            self._complete(forward)
        except _LastInputSeen:
            return True
        if self._held is not None:
            raise self._held
        if self._probed:
            # This pass was to end early and did not, so the number of calls depends on the batch (experts do that).
            self._expected_calls = None
            return True
        self._probed = True
        return self._learn_from_probe()

    def idle(self, forward: Callable[[], Any]) -> None:
        """Make one pass in which nothing is handed over."""
        self._idle = True
        try:
            self._complete(forward)
        finally:
            self._idle = False

    def _complete(self, forward: Callable[[], Any]) -> None:
        try:
            forward()
        except BaseException:
            self.broken = self.unbroken
            raise

    def _make_hook(self, name: str, layer: LayerType) -> Callable[..., None]:
        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering = layer.entering(module, args, kwargs)
            self._calls[name] += 1
            if self._probed:
                if self.input_of.setdefault(name, name) == name:
                    self.consumer(name, entering)
            else:
                number = (layer.form(module), *map(self._seen.number, layer.tensors(entering)))
                self._numbers.setdefault(name, []).append(number)
                # A target that is called twice with one tensor has its rows twice, as in all passes to come.
                if self._owners.setdefault(number, name) == name:
                    self.consumer(name, entering)
            if self._calls == self._expected_calls:
                raise _LastInputSeen

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._idle or self._held is not None:
                return
            try:
                take(module, args, kwargs)
            except Exception as error:
                if not self.unbroken:
                    raise
                self._held = error

        return hook

    def _learn_from_probe(self) -> bool:
        """Group the targets whose tensors were the same in every call, and unhook all but the first of each group."""
        first_of: dict[tuple[Hashable, ...], str] = {}
        regular = True
        for name, numbers in self._numbers.items():
            self.input_of[name] = first_of.setdefault(tuple(numbers), name)
            regular &= all(self._owners[number] == self.input_of[name] for number in numbers)
        for name, key in self.input_of.items():
            if key != name and name in self._handles:
                self._handles.pop(name).remove()
        if len(self.input_of) == len(self.targets) and not self.to_the_end:
            self._expected_calls = Counter({name: self._calls[name] for name in self._handles})
        return regular


@contextmanager
def encoder_output_test(model: Any) -> Iterator[Callable[[Tensor], bool]]:
    """Yield a function that tells whether a tensor is what the encoder of an encoder-decoder model gave last.

    Keys and values of cross-attention belong to the decoder by name, but their rows are positions of the encoder.
    """
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    given: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given[:] = [output if isinstance(output, Tensor) else output[0]]

    handle = encoder.register_forward_hook(keep) if isinstance(encoder, nn.Module) else None
    try:
        yield lambda tensor: bool(given) and tensor.data_ptr() == given[0].data_ptr() and tensor.shape == given[0].shape
    finally:
        if handle is not None:
            handle.remove()
