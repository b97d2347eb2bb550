"""The outline of a forward pass: what a model does before, between and after its blocks, without running a block.

A model that keeps its blocks in one list calls them in turn, each with the hidden state that the one before gave and
with arguments that do not depend on it (masks, position embeddings). In an outline pass every block is a stand-in that
notes its arguments and hands on a tensor without values, on the meta device. Whatever the model computes from that
tensor is on the meta device too, so an argument that does depend on another block is detected and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evatune.errors import EvaError


class _Hidden:
    """Marks where the hidden state goes among the arguments of a block."""


HIDDEN = _Hidden()


@dataclass(frozen=True, kw_only=True)
class Call:
    """How the model calls one block."""

    block: str
    """Name of the block."""
    args: tuple[Any, ...]
    """Positional arguments, with `HIDDEN` for the hidden state."""
    kwargs: dict[str, Any]
    """Keyword arguments, likewise."""


class _LastBlock(Exception):  # noqa: N818 - not an error: it ends a pass
    """The last block of interest was entered."""


class _MisfitError(EvaError):
    """The model does something between its blocks that an outline cannot follow."""

    def __init__(self, model: nn.Module, reason: str) -> None:
        super().__init__(
            f"{type(model).__name__} cannot be run block by block ({reason}); load it whole and use `measure`."
        )


# What a block returns to its model: the hidden state alone, or first in a tuple. The second member of the tuple has no
# values, so a model that passes it on to the next block is detected.
_STYLES: tuple[Callable[[Tensor], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, torch.empty(1, device="meta")),
)


class Outline:
    """Runs a model with stand-ins for its blocks.

    Args:
        model: the model; the `forward` of its blocks is replaced during a pass.
        blocks: its blocks by name, in order.
        last: name of the last block that matters; recording ends where it is entered.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], *, last: str) -> None:
        self.model = model
        self.blocks = blocks
        self.last = last
        self._style = _STYLES[0]
        self._calls: list[Call] = []
        self._hidden: Tensor | None = None
        self._handed: Tensor | None = None
        self._output: Any = None

    def learn_style(self, forward: Callable[[], Any]) -> None:
        """Find out in which form the blocks return the hidden state: alone, or first in a tuple.

        Args:
            forward: calls the model.

        Raises:
            EvaError: no form works, so this model is not one list of blocks.
        """
        misfits: list[_MisfitError] = []
        for style in _STYLES:
            self._style = style
            try:
                self.record(forward)
            except _MisfitError as error:
                misfits.append(error)
            except EvaError:
                raise
            except Exception as error:  # a wrong form can cause any error in the model
                misfits.append(_MisfitError(self.model, str(error).strip().split("\n")[0]))
            else:
                return
        # An argument that depends on a block explains more than the error of a model that gets an unexpected tuple.
        raise EvaError(str(next((error for error in misfits if "depends" in str(error)), misfits[0]))) from None

    def record(self, forward: Callable[[], Any]) -> tuple[Tensor, list[Call]]:
        """Run what comes before the blocks.

        Args:
            forward: calls the model.

        Returns:
            The hidden state that enters the first block, and the calls of all blocks up to the last.
        """
        self._calls, self._hidden, self._output = [], None, None
        self._run(forward)
        if self._hidden is None or self._calls[-1].block != self.last:
            raise _MisfitError(self.model, f"a pass does not reach {self.last!r}")
        return self._hidden, self._calls

    def finish(self, forward: Callable[[], Any], output: Any) -> None:
        """Run what comes after the blocks (and what comes before them once more).

        Args:
            forward: calls the model.
            output: what the last block returned.
        """
        self._calls, self._hidden, self._output = [], None, output
        self._run(forward)

    def _run(self, forward: Callable[[], Any]) -> None:
        for name, block in self.blocks.items():
            block.forward = self._stand_in(name)
        try:
            forward()
        except _LastBlock:
            pass
        finally:
            for block in self.blocks.values():
                del block.forward

    def _stand_in(self, name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if any(call.block == name for call in self._calls):
                raise _MisfitError(self.model, f"{name!r} is called twice in a pass")
            if self._hidden is None:
                expected = args[0] if args else kwargs.get("hidden_states")
                if not isinstance(expected, Tensor) or not expected.is_floating_point() or expected.is_meta:
                    raise _MisfitError(self.model, f"the first argument of {name!r} is not a hidden state")
                self._hidden = expected
            else:
                assert self._handed is not None
                expected = self._handed
                if not any(value is expected for value in (*args, *kwargs.values())):
                    raise _MisfitError(self.model, f"{name!r} does not get what the block before it returned")

            def marked(value: Any) -> Any:
                if value is not expected and _has_meta(value):
                    raise _MisfitError(self.model, f"an argument of {name!r} depends on the blocks before it")
                return HIDDEN if value is expected else value

            named = {key: marked(value) for key, value in kwargs.items()}
            self._calls.append(Call(block=name, args=tuple(map(marked, args)), kwargs=named))
            if name == self.last:
                if self._output is None:
                    raise _LastBlock
                return self._output
            self._handed = torch.empty_like(self._hidden, device="meta")
            return self._style(self._handed)

        return forward


def _has_meta(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_meta
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return any(_has_meta(member) for member in members)
