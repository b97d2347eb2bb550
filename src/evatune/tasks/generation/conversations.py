"""Conversations as strings, written by the tokenizer's chat template; the turns of the assistant are learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evatune.errors import EvaError, near_misses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak in a conversation."""
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
    "function": "tool",
}
Message = dict[str, Any]


def is_conversation(value: Any) -> bool:
    """Return whether a field holds turns, not a string."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def read_messages(turns: Any) -> list[Message]:
    """Return turns with `role` and `content` as strings, from any spelling of the source.

    Args:
        turns: mappings with `role` and `content`, or with `from` and `value` (ShareGPT); content may be parts.

    Raises:
        EvaError: a turn has no known role, or its content is not a string.
    """
    if not isinstance(turns, list | tuple):
        raise EvaError(f"a conversation must be a list of turns, not {_shown(turns)}.")
    return [_message(turn, number) for number, turn in enumerate(turns, start=1)]


def written(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, tools: Any = None, first_learned: int = 0
) -> list[tuple[str, bool]]:
    """Return a conversation as strings, each learned or not.

    Args:
        messages: the turns.
        tokenizer: has a chat template.
        tools: the functions that the assistant may call, as the template takes them; JSON text is read.
        first_learned: turns of the assistant before this index are read only.

    Returns:
        (text, learned) in order; nothing where the assistant says nothing.

    Raises:
        EvaError: the template refuses the turns, or rewrites earlier turns when a new one follows.
    """
    given = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None

    def text(count: int, **options: Any) -> str:
        if not count:
            return ""
        try:
            return str(tokenizer.apply_chat_template(list(messages[:count]), tools=given, tokenize=False, **options))
        except Exception as error:  # templates raise errors of their own, and jinja2 its own
            raise EvaError(f"the chat template cannot write this conversation: {error}.") from error

    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first_learned:
            continue
        if not message.get("content") and not message.get("tool_calls"):
            continue
        before, after = text(index, add_generation_prompt=True), text(index + 1)
        if not before.startswith(done) or not after.startswith(before):
            raise EvaError(
                "this tokenizer's chat template rewrites earlier turns when a new one follows, so turns cannot be "
                "learned one by one; give prompt and completion fields instead."
            )
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise EvaError(f"turn {number} must have a role and a content, not {_shown(turn)}.")
    source = turn.get("role", turn.get("from"))
    role = _SHAREGPT_ROLES.get(str(source).lower(), str(source).lower())
    if role not in ROLES:
        raise EvaError(
            f"turn {number} is of role {source!r}{near_misses(str(source), ROLES)}; known are {', '.join(ROLES)}."
        )
    content = turn["content"] if "content" in turn else turn.get("value")
    # Other keys that a template may use, such as tool_calls, are kept.
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    return {key: value for key, value in rest.items() if value is not None} | {
        "role": role,
        "content": _content(content, number),
    }


def _content(content: Any, number: int) -> str:
    """Return a turn's content as one string."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise EvaError(f"the content of turn {number} is {_shown(content)}, which is not a string.")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            raise EvaError(f"turn {number} has a part of type {kind!r}, and this task reads parts of text only.")
        texts.append(text)
    return "".join(texts)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
