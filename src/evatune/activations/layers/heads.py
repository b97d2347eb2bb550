"""Which parts of a model are heads: "all-linear" leaves them out, and some of them are trained whole instead.

A language model's head is pretrained and as wide as the vocabulary: it gets no adapter and stays frozen. Any other head
belongs to one task and is new when fine-tuning begins. An adapter cannot learn while such a random head is frozen, so
these heads are trained whole. How heads are recognized:

1. a language model's head: what `get_output_embeddings()` returns, if an embedding of the model has as many tokens as
   the head has outputs;
2. a classifier that the model names itself, by `get_classifier()`;
3. in a transformers class such as `BertForSequenceClassification`, everything beside the pretrained part, which is the
   child that `base_model_prefix` names;
4. in any model, direct children with one of the names in `HEAD_NAMES`.

A model with a language model's head has no other head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

HEAD_NAMES = ("classifier", "score", "qa_outputs", "classification_head")
"""What libraries call the head of a classifier."""

_TASK_CLASS = re.compile(r"For[A-Z]")


def find_heads(model: Any) -> dict[str, bool]:
    """Return the heads of a model by name, in its order, and whether each is to be trained whole.

    Args:
        model: the base model, without PEFT's wrappers around it.
    """
    names = {id(module): name.replace("._orig_mod", "") for name, module in model.named_modules()}
    output = _called(model, "get_output_embeddings")
    if output is not None and id(output) in names:
        if _is_language_head(model, output):
            return {names[id(output)]: False}
        heads = [output]
    else:
        heads = []
    classifier = _called(model, "get_classifier")
    heads += [classifier] if classifier is not None and id(classifier) in names else []
    heads += [child for name, child in model.named_children() if name in HEAD_NAMES]
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if isinstance(body, nn.Module) and body is not model and _TASK_CLASS.search(type(model).__name__):
        heads += [child for child in model.children() if child is not body]
    wanted = {id(part) for head in heads for part in _callable_parts(head) if any(True for _ in part.parameters())}
    found = [name for number, name in names.items() if number in wanted and name]
    return {name: True for name in found if not any(name.startswith(f"{other}.") for other in found)}


def _called(model: Any, method: str) -> Any:
    """Return the module that a method of the model returns, or None if there is no such method or no such module."""
    try:
        module = getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return module if isinstance(module, nn.Module) else None


def _is_language_head(model: nn.Module, head: Any) -> bool:
    n_outputs = getattr(head, "out_features", None)
    if n_outputs is None:
        return True
    return any(module.num_embeddings == n_outputs for module in model.modules() if isinstance(module, nn.Embedding))


def _callable_parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, or what a list or mapping of modules holds, since PEFT trains only modules that are called."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for child in module.children():
            yield from _callable_parts(child)
    else:
        yield module
