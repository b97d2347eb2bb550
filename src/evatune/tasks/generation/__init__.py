"""Text generation: prompts and completions from files or a hub, batches, and evaluation on held-out data."""

from __future__ import annotations

from evatune.tasks.generation.encoding import Collator, EncodedExamples, batches, encode_examples
from evatune.tasks.generation.evaluation import Evaluation, evaluate
from evatune.tasks.generation.examples import Examples, load_examples
from evatune.tasks.generation.formats import FORMATS, Example

__all__ = [
    "FORMATS",
    "Collator",
    "EncodedExamples",
    "Evaluation",
    "Example",
    "Examples",
    "batches",
    "encode_examples",
    "evaluate",
    "load_examples",
]
