"""Hooks that hand over the inputs of the targets of a model, and skip the computation after the last target.

A pass is needed only up to the last call of a target. While the model runs, nobody knows which call is the last:
another batch may make one more. So a pass is not cut off. At the call that was the last one in earlier passes, the
module gets a tensor without values (`AbsentTensor`): this module and all that follow, above all the head, see shapes
and compute nothing. If another target is called after that, or if the model reads a value, the pass is repeated with
all values, and all later passes are computed to the end. Inputs that were handed over are not handed over again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from evatune.activations.absent import AbsentTensor
from evatune.activations.layer_type import LayerType, TargetModule
from evatune.activations.sharing import SharedInputs
from evatune.errors import EvaError

Watcher = Callable[[str, int, Any], None]


class _MoreCallsError(Exception):
    """A target was called after the call that was expected to be the last."""


class Capture:
    """Hooks on the targets of a model, for as long as the `with` block lasts.

    Args:
        model: the model that is called.
        targets: what to hook.
        shared: gets every call of a target.
        to_the_end: compute every pass to its end. Needed if its output is wanted, or if the caller's own code runs in
            it, which must not get tensors without values.
        unbroken: as `to_the_end`; besides, an error in a hook does not end the pass, because other processes take part
            in it. The error is raised after the pass.

    Attributes:
        broken: whether an unbroken pass has ended early all the same, because the model itself failed.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[TargetModule],
        shared: SharedInputs,
        *,
        to_the_end: bool = False,
        unbroken: bool = False,
    ) -> None:
        self.model = model
        self.targets = targets
        self.shared = shared
        self.unbroken = unbroken
        self.broken = False
        self._may_shorten = not (to_the_end or unbroken)
        self._handles: list[Any] = []
        self._most_calls: Counter[str] = Counter()
        self._is_tried = False  # whether a shortened pass has left no tensor without values in the model
        self._watch: Watcher | None = None
        self._begin_pass(shorten=False)

    def _begin_pass(self, *, shorten: bool) -> None:
        self._held: Exception | None = None
        self._calls: Counter[str] = Counter()
        self._shortens = shorten
        self._n_left = len(self._most_calls)  # targets that may be called again
        self._shortened = False

    def __enter__(self) -> Capture:
        for target in self.targets:
            hook = self._make_hook(target.name, target.layer)
            self._handles.append(target.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(self, forward: Callable[[], Any]) -> bool:
        """Make one pass.

        Args:
            forward: calls the model.

        Returns:
            False if the same pass must be repeated.
        """
        self._begin_pass(shorten=self._may_shorten and bool(self._most_calls))
        self.shared.begin_pass()
        state = _state_of(self.model) if self._shortens and not self._is_tried else []
        try:
            self._complete(forward)
        except Exception:
            if not self._shortened:
                raise
            self._may_shorten = False
        finally:
            if self._shortened and not self._is_tried:
                self._may_shorten &= not _restored(state)
                self._is_tried = True
        if self._shortened and not self._may_shorten:
            return False
        if self._held is not None:
            raise self._held
        if not self._shortened:
            self._most_calls |= self._calls
        return self.shared.end_pass()

    def watch(self, forward: Callable[[], Any], watcher: Watcher) -> None:
        """Make one pass in which nothing is handed over.

        Args:
            forward: calls the model.
            watcher: takes the name of each target that is called, the number of the call, and what enters.
        """
        self._begin_pass(shorten=False)
        self._watch = watcher
        try:
            self._complete(forward)
        finally:
            self._watch = None
        if self._held is not None:
            raise self._held

    def _complete(self, forward: Callable[[], Any]) -> None:
        try:
            forward()
        except BaseException:
            self.broken = self.unbroken
            raise

    def _make_hook(self, name: str, layer: LayerType) -> Callable[..., Any]:
        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._shortened:
                raise _MoreCallsError
            entering = layer.entering(module, args, kwargs)
            tensors = layer.tensors(entering)
            if any(isinstance(tensor, AbsentTensor) for tensor in tensors):
                raise EvaError(
                    f"{name!r} gets a tensor that the model has kept from its last pass, whose end was not computed; "
                    "pass forward=lambda model, batch: model(**batch), then every pass is computed to its end."
                )
            number = self._calls[name]
            self._calls[name] = number + 1
            if self._watch is not None:
                self._watch(name, number, entering)
                return None
            self.shared.call(name, entering, tensors=tensors, form=layer.form(module))
            if not self._shortens or number + 1 != self._most_calls[name]:
                return None
            self._n_left -= 1
            if self._n_left:
                return None
            self._shortened = True
            return tuple(map(_emptied, args)), {key: _emptied(value) for key, value in kwargs.items()}

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._held is not None:
                return None
            try:
                return take(module, args, kwargs)
            except Exception as error:
                if not self.unbroken:
                    raise
                self._held = error
                return None

        return hook


def _emptied(value: Any) -> Any:
    return AbsentTensor(value) if isinstance(value, Tensor) else value


def _state_of(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return each dictionary of attributes of every module of a model, with a copy of it."""
    held = [held for module in model.modules() for held in (module.__dict__, module._buffers)]
    return [(present, dict(present)) for present in held]


def _restored(state: list[tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    """Put the old value back wherever a tensor without values is now; return whether there was any."""
    found = False
    for present, before in state:
        for name in [name for name, value in present.items() if _has_no_values(value)]:
            found = True
            if name in before:
                present[name] = before[name]
            else:
                del present[name]
    return found


def _has_no_values(value: Any) -> bool:
    if not isinstance(value, dict | list | tuple):
        return isinstance(value, AbsentTensor)
    members = value.values() if isinstance(value, dict) else value
    return any(isinstance(member, AbsentTensor) for member in members)
