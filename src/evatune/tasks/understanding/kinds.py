"""All kinds of understanding by name."""

from __future__ import annotations

from typing import Any

from evatune.tasks.understanding.classification import Classification
from evatune.tasks.understanding.kind import Kind
from evatune.tasks.understanding.question_answering import QuestionAnswering
from evatune.tasks.understanding.regression import Regression
from evatune.tasks.understanding.settings import UnderstandingData
from evatune.tasks.understanding.token_classification import TokenClassification

KINDS: dict[str, Any] = {
    "classification": Classification,
    "regression": Regression,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
}
"""A kind is made of the settings of the `data:` section."""


def kind_of(data: UnderstandingData) -> Kind:
    """Return what a recipe's data are for."""
    return KINDS[data.learned](data=data)
