"""The task of understanding: a language model with a new head learns what stands beside texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evatune.errors import EvaError, near_misses
from evatune.models import load_model, load_tokenizer
from evatune.models.loading import load_positions
from evatune.settings import IGNORED_LABEL
from evatune.tasks.classes import check_classes, write_classes
from evatune.tasks.examples import Examples, gather
from evatune.tasks.journal import Journal
from evatune.tasks.outline import Outline
from evatune.tasks.scores import Scores
from evatune.tasks.settings import ModelSettings
from evatune.tasks.task import Needs, Preview
from evatune.tasks.understanding.evaluation import predict, scores_of
from evatune.tasks.understanding.glue import TASKS
from evatune.tasks.understanding.held_out import HeldOut, read_held_out
from evatune.tasks.understanding.kind import Encoded, Kind
from evatune.tasks.understanding.kinds import kind_of
from evatune.tasks.understanding.outline import outline
from evatune.tasks.understanding.settings import UnderstandingData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 1_000_000
"""Tokenizers that do not know how long the model's sequences may be say a number above this one."""


def open_task(data: UnderstandingData, *, model: ModelSettings, seed: int) -> Understanding:
    """Return the task; see `evatune.tasks.open_task`."""
    return Understanding(data=data, source=model, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Understanding:
    """Texts and what is learned of them, for a language model with a new head; see `evatune.tasks.task.Task`."""

    data: UnderstandingData
    source: ModelSettings
    seed: int

    @cached_property
    def kind(self) -> Kind:
        """What is learned."""
        return kind_of(self.data)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model; one without a padding token pads with its end token.

        Raises:
            EvaError: it has neither, or the model's sequences are shorter than `data.max_length`.
        """
        tokenizer = load_tokenizer(
            self.source.name,
            gguf_file=self.source.gguf_file,
            revision=self.source.revision,
            trust_remote_code=self.source.trust_remote_code,
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise EvaError(
                f"the tokenizer of {self.source.name} has neither a padding token nor an end token; set pad_token in "
                "its tokenizer_config.json."
            )
        longest: int | None = tokenizer.model_max_length
        if tokenizer.model_max_length > NO_LIMIT:
            longest = load_positions(
                self.source.name,
                gguf_file=self.source.gguf_file,
                revision=self.source.revision,
                trust_remote_code=self.source.trust_remote_code,
            )
        if longest and longest < self.data.max_length:
            raise EvaError(
                f"data.max_length is {self.data.max_length}, but {self.source.name} takes {longest} tokens at most."
            )
        tokenizer.truncation_side, tokenizer.padding_side = self.data.cut, "right"  # targets are places from the left
        return tokenizer

    @cached_property
    def examples(self) -> Examples[Any]:
        """The training examples."""
        return gather(
            self.data.train,
            lambda row, _, file: self.kind.converter(row, file),
            seed=self.seed,
            on_disk=self.data.streaming,
            **self.data.reading("training"),
        )

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the head's outputs; the training data are read only where nothing else says them."""
        return self.kind.stated or self.kind.labels(self.examples)

    @cached_property
    def train(self) -> Encoded:
        """The training examples as tokens.

        Raises:
            EvaError: there is nothing to tell apart, such as texts of one class.
        """
        self.kind.labels(self.examples)
        return self._encoded(self.examples, on_disk=self.data.streaming)

    @cached_property
    def held_out(self) -> Encoded:
        """The held-out examples as tokens."""
        return self._encoded(self._held_out.examples)

    def headline_of(self, labels: Sequence[str]) -> str:
        """Return the metric that is reported first, for a head of these outputs.

        Raises:
            EvaError: there is no metric of this name.
        """
        metrics, wanted = self.kind.metrics(labels), self.data.headline
        wanted = wanted or (TASKS[self.data.glue].headline if self.data.glue else next(iter(metrics)))
        if wanted not in metrics:
            raise EvaError(
                f"data.headline is {wanted!r}, but must be one of {', '.join(metrics)}{near_misses(wanted, metrics)}."
            )
        return wanted

    def kinds(self) -> list[str]:
        """Return what is learned of each training row."""
        return [self.kind.learned(row, self.labels) for row in self.train.rows]

    def outline(self) -> Outline:
        """Return what is known without weights and without a hub."""
        return outline(self)

    def load_model(self) -> Any:
        """Return the language model with a head for what is learned."""
        model = load_model(
            self.source.name,
            gguf_file=self.source.gguf_file,
            dtype=self.source.dtype,
            revision=self.source.revision,
            trust_remote_code=self.source.trust_remote_code,
            head=self.kind.head,
            labels=self.labels,
        )
        model.config.problem_type = self.kind.problem_type
        if model.config.pad_token_id is None:  # decoders read their last token that is not padding
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def needs(self, model: Any) -> Needs:
        """Return what the model needs: its head are the modules outside the pretrained part, and new ones inside."""
        base, new = model.base_model_prefix, set(getattr(model, "new_weights", ()))
        outside = [name for name, module in model.named_children() if name != base and _has_weights(module)]
        inside = [
            f"{base}.{name}"
            for name, module in getattr(model, base).named_children()
            if _has_weights(module) and new >= {f"{base}.{name}.{key}" for key, _ in module.named_parameters()}
        ]
        return Needs(task_type=self.kind.task_type, heads=(*inside, *outside))

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return rows as a padded batch; targets are (rows,), or (rows, tokens) with -100 where none is learned."""
        names = self.tokenizer.model_input_names
        batch = dict(self.tokenizer.pad([{n: row[n] for n in names if n in row} for row in rows], return_tensors="pt"))
        for name in self.kind.targets:
            batch[name] = torch.tensor([_padded(row[name], batch["input_ids"].shape[1]) for row in rows])
        return batch

    def evaluate(
        self,
        model: Any,
        *,
        limit: int | None = None,
        bf16: bool = False,
        progress: bool = True,
        journal: Journal | None = None,
    ) -> Scores:
        """Score a model on held-out texts; a journal knows what was computed before."""
        started = time.perf_counter()
        examples = self._held_out.examples[:limit]
        headline = self.headline_of(self.labels)
        encoded = self.held_out if limit is None else self._encoded(examples)
        options: dict[str, Any] = {"bf16": bf16, "progress": progress, "journal": journal}
        outputs = predict(model, encoded.rows, self.collate, kind=self.kind, **options)
        return scores_of(
            self.kind.outcomes(outputs, encoded, examples, self.labels),
            metrics=self.kind.metrics(self.labels),
            headline=headline,
            sets=self._held_out.sets[:limit],
            counts={"examples": len(examples), "dropped": self._held_out.examples.dropped, "cut": encoded.cut},
            seconds=time.perf_counter() - started,
        )

    def preview(self, n: int) -> Preview:
        """Return the first texts, decoded from their tokens, and what is learned of them, after an arrow."""
        content = [
            {
                "text": str(self.tokenizer.decode(row["input_ids"], clean_up_tokenization_spaces=False)),
                "learned": self.kind.learned(row, self.labels),
                "tokens": len(row["input_ids"]),
            }
            for row in self.train.rows[:n]
        ]
        shown = [
            f"── example {number}: {row['tokens']} tokens, what stands in ⟦ ⟧ is learned\n"
            f"{row['text']} → ⟦{row['learned']}⟧"
            for number, row in enumerate(content, start=1)
        ]
        return Preview(text="\n\n".join(shown), content=content)

    def summary(self) -> str:
        """Return how many texts, from where, what is learned, how many rows were dropped or cut."""
        how = self.kind.too_long.format(cut=self.data.cut)
        long = f"{self.train.cut:,} longer than {self.data.max_length} tokens, {how}"
        return f"{self.examples.summary()}, {self.kind.about(self.labels)}, {long}"

    def facts(self) -> dict[str, Any]:
        """Return the counts for the record.

        Raises:
            EvaError: see `headline_of`.
        """
        self.headline_of(self.labels)  # before a run, not after it
        return {
            "train": len(self.examples),
            "train_dropped": self.examples.dropped,
            "train_shortened": self.train.cut,
            **self.kind.facts(self.examples, self.labels),
            "held_out": len(self._held_out.examples),
            "held_out_shortened": self.held_out.cut,
        }

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer, and the names of the head's outputs as `classes.json`."""
        self.tokenizer.save_pretrained(folder)
        write_classes(folder, self.labels)

    def check_saved(self, folder: Path) -> None:
        """Check that a folder, if it holds a model with a head, is for the labels of these data."""
        check_classes(folder, self.labels, way_out="give the training data that it learned from, or name data.classes")

    @cached_property
    def _held_out(self) -> HeldOut:
        return read_held_out(self.data, self.kind.converter, seed=self.seed)

    def _encoded(self, examples: Sequence[Any], *, on_disk: bool = False) -> Encoded:
        options: dict[str, Any] = {"labels": self.labels, "max_length": self.data.max_length, "on_disk": on_disk}
        return self.kind.encode(examples, self.tokenizer, **options)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _padded(target: Any, length: int) -> Any:
    """Return a target as long as the batch, if it is one for each token."""
    return target + [IGNORED_LABEL] * (length - len(target)) if isinstance(target, list) else target
