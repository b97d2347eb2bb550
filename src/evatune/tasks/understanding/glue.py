"""The eight tasks of GLUE as rows of data (Wang et al. 2019, arXiv:1804.07461; Table 17 of the EVA paper)."""

from __future__ import annotations

from dataclasses import dataclass

HUB = "nyu-mll/glue"
"""The hub data set; its configurations have the names of the tasks."""


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One task."""

    texts: tuple[tuple[str, ...], ...]
    """Names of the columns of texts: on the hub, then in the files of GLUE or of the authors."""
    labels: tuple[str, ...] = ("label",)
    """Names of the column of labels."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; none for a regression."""
    label_range: tuple[float, float] | None = None
    """Lowest and highest label of a regression."""
    headline: str = "accuracy"
    """The metric that is reported first."""
    held_out: str = "validation"
    """Split on the hub that is scored, since the labels of the test split are hidden; several are joined by a plus."""


_ENTAILS = ("entailment", "not_entailment")

TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(texts=(("sentence",),), classes=("unacceptable", "acceptable"), headline="matthews"),
    "sst2": GlueTask(texts=(("sentence",),), classes=("negative", "positive")),
    "mrpc": GlueTask(
        texts=(("sentence1", "sentence2"), ("#1 String", "#2 String")),
        labels=("label", "Quality"),
        classes=("not_equivalent", "equivalent"),
    ),
    "qqp": GlueTask(
        texts=(("question1", "question2"),),
        labels=("label", "is_duplicate"),
        classes=("not_duplicate", "duplicate"),
    ),
    "stsb": GlueTask(
        texts=(("sentence1", "sentence2"),), labels=("label", "score"), label_range=(0, 5), headline="pearson"
    ),
    "mnli": GlueTask(
        texts=(("premise", "hypothesis"), ("sentence1", "sentence2")),
        labels=("label", "gold_label"),
        classes=("entailment", "neutral", "contradiction"),
        held_out="validation_matched+validation_mismatched",
    ),
    "qnli": GlueTask(texts=(("question", "sentence"),), classes=_ENTAILS),
    "rte": GlueTask(texts=(("sentence1", "sentence2"),), classes=_ENTAILS),
}
"""All tasks by name."""
