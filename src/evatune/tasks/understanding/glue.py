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
    train_size: int
    """Rows to learn from on the hub."""
    held_out: str = "validation"
    """Split on the hub that is scored, since the labels of the test split are hidden; several are joined by a plus."""


_ENTAILS = ("entailment", "not_entailment")

TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        train_size=8_551, texts=(("sentence",),), classes=("unacceptable", "acceptable"), headline="matthews"
    ),
    "sst2": GlueTask(train_size=67_349, texts=(("sentence",),), classes=("negative", "positive")),
    "mrpc": GlueTask(
        train_size=3_668,
        texts=(("sentence1", "sentence2"), ("#1 String", "#2 String")),
        labels=("label", "Quality"),
        classes=("not_equivalent", "equivalent"),
    ),
    "qqp": GlueTask(
        train_size=363_846,
        texts=(("question1", "question2"),),
        labels=("label", "is_duplicate"),
        classes=("not_duplicate", "duplicate"),
    ),
    "stsb": GlueTask(
        train_size=5_749,
        texts=(("sentence1", "sentence2"),),
        labels=("label", "score"),
        label_range=(0, 5),
        headline="pearson",
    ),
    "mnli": GlueTask(
        train_size=392_702,
        texts=(("premise", "hypothesis"), ("sentence1", "sentence2")),
        labels=("label", "gold_label"),
        classes=("entailment", "neutral", "contradiction"),
        held_out="validation_matched+validation_mismatched",
    ),
    "qnli": GlueTask(train_size=104_743, texts=(("question", "sentence"),), classes=_ENTAILS),
    "rte": GlueTask(train_size=2_490, texts=(("sentence1", "sentence2"),), classes=_ENTAILS),
}
"""All tasks by name."""
