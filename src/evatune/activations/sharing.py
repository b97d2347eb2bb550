"""Which targets receive the same tensors, so that these are measured only once (q, k and v; gate and up).

Tensors are compared by identity, never by their values: same memory, same geometry, same version. A tensor without
elements is ignored: it has no memory that identifies it, and no rows.

Targets that share an input in one batch need not share it in the next. They share it as long as they have received the
same tensors in every call of every pass. So the n-th call of a shared input is handed over when all its targets have
made their n-th call. If the tensors differ there, or one target makes fewer calls, the targets have shared all rows
before: the input is split in two with equal states, and each continues with its own tensors. This needs no repeated
pass, unless a tensor that waited for other targets was changed in place.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from evatune.errors import EvaError

Number = tuple[Hashable, ...]


class SeenTensors:
    """The tensors that one forward pass has shown so far, numbered."""

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor: a new one, unless this tensor was seen before.

        Only a weak reference to the tensor is held; while the tensor is alive, no other tensor can have its memory.
        """
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, version_of(tensor))
        if key in self._seen:
            reference, number = self._seen[key]
            if reference() is not None:
                return number
        self._count += 1
        self._seen[key] = (weakref.ref(tensor), self._count)
        return self._count


def version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None for a tensor of inference mode, which has no counter."""
    return None if tensor.is_inference() else tensor._version


@dataclass
class _Call:
    """One call of a target."""

    entering: Any
    """What entered, as the layer type hands it over."""
    form: Hashable
    tensors: tuple[Tensor, ...]
    versions: tuple[int | None, ...]
    number: Number
    """Identifies its input among those of this pass."""

    def is_of(self, form: Hashable, tensors: tuple[Tensor, ...]) -> bool:
        """Tell, at little cost, whether a call has the same form and the same tensor objects, unchanged since."""
        same = len(tensors) == len(self.tensors) and all(map(operator.is_, tensors, self.tensors))
        return same and form == self.form and self.is_unchanged()

    def is_unchanged(self) -> bool:
        return self.versions == tuple(map(version_of, self.tensors))


@dataclass
class _Input:
    """The input that some targets have shared so far."""

    members: list[str]
    n_taken: int = 0
    """How many calls of this batch were handed over."""
    n_passed: int = 0
    """How many calls of this pass have been made by all members."""
    waiting: list[dict[str, _Call]] = field(default_factory=list)
    """The calls after these, each by the names of the targets that have made it already."""
    closed: bool = False
    """Whether no more calls of this pass can be handed over."""
    lost: bool = False
    """Whether a tensor was changed in place while it waited."""


class SharedInputs:
    """Groups targets by their inputs, and hands over each call of an input once.

    Args:
        take: called with the key of an input, the number of the call in its pass and what entered. It returns False if
            it cannot take the call yet; it then gets this call, and those that follow, when the pass is repeated.
        look: called for the calls after one that was not taken, in the same pass.
        split: called with the key of an input and a new key: from now on there are two inputs, with the same rows so
            far.

    Attributes:
        input_of: for every target that got any element so far, the key of its input, which is the name of one of them.
    """

    def __init__(
        self,
        take: Callable[[str, int, Any], bool],
        split: Callable[[str, str], None],
        look: Callable[[str, int, Any], None] = lambda key, number, entering: None,
    ) -> None:
        self.input_of: dict[str, str] = {}
        self._take = take
        self._look = look
        self._split_state = split
        self._inputs: dict[str, _Input] = {}
        self._only: frozenset[str] | None = None
        self._calls: dict[str, int] = {}
        self._born: dict[Number, str] = {}
        self._seen = SeenTensors()

    def begin_batch(self, only: Iterable[str] | None = None) -> None:
        """Prepare for a batch, or for a part of one.

        Args:
            only: keys of the inputs that are handed over; None means all.
        """
        self._only = None if only is None else frozenset(only)
        for shared in self._inputs.values():
            shared.n_taken = 0

    def begin_pass(self) -> None:
        """Prepare for a pass; calls of this batch that were handed over already are not handed over again."""
        self._seen, self._calls, self._born = SeenTensors(), {}, {}
        for shared in self._inputs.values():
            shared.n_passed, shared.waiting, shared.closed, shared.lost = 0, [], False, False

    def call(self, name: str, entering: Any, *, tensors: tuple[Tensor, ...], form: Hashable = None) -> None:
        """Note that a target is called.

        Args:
            name: the target.
            entering: what enters it.
            tensors: the tensors by which its input is known.
            form: what makes different rows out of the same tensors.
        """
        if tensors and not any(tensor.numel() for tensor in tensors):
            return
        key = self.input_of.get(name)
        n_calls = self._calls.get(name, 0)
        self._calls[name] = n_calls + 1
        if key is None:
            number = self._number(form, tensors)
            # On its first call, a target joins an input that another target got in this pass.
            key = self.input_of[name] = self._born.setdefault(number, name)
            if key != name:
                self._inputs[key].members.append(name)
                return
            self._inputs[key] = _Input(members=[name])
            if self._only is not None:
                self._only |= {name}
        elif n_calls == 1 and self._born:
            self._born = {born: owner for born, owner in self._born.items() if owner != key}
        shared = self._inputs[key]
        if len(shared.members) == 1:
            self._hand_over(key, shared, entering)
            return
        place = n_calls - shared.n_passed
        if place == len(shared.waiting):
            shared.waiting.append({})
        calls = shared.waiting[place]
        first = next(iter(calls.values()), None)
        if first is None or not first.is_of(form, tensors):
            first = _Call(entering, form, tensors, tuple(map(version_of, tensors)), self._number(form, tensors))
        calls[name] = first
        if len(calls) == len(shared.members):
            self._advance(key)

    def end_pass(self) -> bool:
        """Hand over what still waits; return False if the pass must be repeated.

        Raises:
            EvaError: this pass was made again and had fewer calls than before.
        """
        for key in list(self._inputs):
            self._advance(key, ended=True)
            shared = self._inputs.get(key)
            if shared and self._is_wanted(key) and not shared.closed and shared.n_passed < shared.n_taken:
                raise EvaError(
                    f"{key!r} is called {shared.n_passed} times when a batch is passed again, and was called "
                    f"{shared.n_taken} times before; let the calls of the model depend on the batch alone."
                )
        lost = [key for key, shared in self._inputs.items() if shared.lost]
        for key in lost:
            self._divide(key, [[name] for name in self._inputs[key].members])
        return not lost

    def _advance(self, key: str, *, ended: bool = False) -> None:
        """Hand over the calls that all targets of an input have made; at the end of a pass, all that were made."""
        shared = self._inputs[key]
        while shared.waiting and (ended or len(shared.waiting[0]) == len(shared.members)):
            calls = shared.waiting[0]
            first = next(iter(calls.values()))
            parts: dict[Number | None, list[str]] = {}
            if len(calls) < len(shared.members) or any(call is not first for call in calls.values()):
                for name in shared.members:
                    parts.setdefault(calls[name].number if name in calls else None, []).append(name)
            if len(parts) > 1:
                for part in self._divide(key, list(parts.values())):
                    self._advance(part, ended=ended)
                return
            shared.waiting.pop(0)
            shared.lost |= not first.is_unchanged()
            shared.closed |= shared.lost
            self._hand_over(key, shared, first.entering)

    def _number(self, form: Hashable, tensors: tuple[Tensor, ...]) -> Number:
        return (form, *map(self._seen.number, tensors))

    def _is_wanted(self, key: str) -> bool:
        return self._only is None or key in self._only

    def has_taken(self, key: str) -> bool:
        """Tell whether calls of this batch were handed over."""
        return self._inputs[key].n_taken > 0

    def _hand_over(self, key: str, shared: _Input, entering: Any) -> None:
        if shared.closed and not shared.lost and self._is_wanted(key):
            self._look(key, shared.n_passed, entering)
        elif self._is_wanted(key) and not shared.closed and shared.n_passed >= shared.n_taken:
            shared.closed = not self._take(key, shared.n_passed, entering)
            shared.n_taken += not shared.closed
        shared.n_passed += 1

    def _divide(self, key: str, parts: list[list[str]]) -> list[str]:
        """Split an input by its targets, and return the keys of the parts; the one with the key's target keeps it."""
        whole = self._inputs[key]
        keys = [key if key in members else members[0] for members in parts]
        for part, members in zip(keys, parts, strict=True):
            waiting = [{name: calls[name] for name in members if name in calls} for calls in whole.waiting]
            while waiting and not waiting[-1]:
                waiting.pop()
            self._inputs[part] = _Input(members, whole.n_taken, whole.n_passed, waiting, whole.closed)
            for name in members:
                self.input_of[name] = part
            if part != key:
                self._split_state(key, part)
                if self._only is not None and key in self._only:
                    self._only |= {part}
        return keys
