"""The task of generation: a causal language model learns completions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from evatune.errors import EvaError
from evatune.models import load_model, load_tokenizer
from evatune.models.loading import load_positions
from evatune.models.prompts import PromptTemplate
from evatune.tasks.disk_list import selected, stored
from evatune.tasks.examples import Examples
from evatune.tasks.generation.answers import check_judges
from evatune.tasks.generation.encoding import IGNORED, Collator, EncodedExamples, encode_examples
from evatune.tasks.generation.evaluation import evaluate
from evatune.tasks.generation.example import Example
from evatune.tasks.generation.examples import load_examples
from evatune.tasks.generation.outline import outline
from evatune.tasks.generation.packing import check_keeps_apart, learned_mask, pack, row_mask
from evatune.tasks.generation.preview import preview
from evatune.tasks.generation.settings import GenerationData
from evatune.tasks.generation.writing import Sampling
from evatune.tasks.journal import Journal
from evatune.tasks.outline import Outline
from evatune.tasks.scores import Scores
from evatune.tasks.settings import ModelSettings
from evatune.tasks.task import Needs, Preview

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_task(data: GenerationData, *, model: ModelSettings, seed: int) -> Generation:
    """Return the task; see `evatune.tasks.open_task`."""
    return Generation(data=data, source=model, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Prompts and completions for a causal language model; see `evatune.tasks.task.Task`."""

    data: GenerationData
    source: ModelSettings
    seed: int

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        source = self.source
        return load_tokenizer(
            source.name,
            gguf_file=source.gguf_file,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            chat_template=source.chat_template,
        )

    @cached_property
    def positions(self) -> int | None:
        """How many tokens the model can read; None where no configuration says it."""
        source = self.source
        try:
            return load_positions(
                source.name,
                gguf_file=source.gguf_file,
                revision=source.revision,
                trust_remote_code=source.trust_remote_code,
            )
        except EvaError:  # a tokenizer may stand alone in its folder; a model that is missing is told when it is loaded
            return None

    @cached_property
    def max_length(self) -> int:
        """The longest sequence in tokens: that of the settings, or what the model can read."""
        return min(self.data.max_length, self.positions or self.data.max_length)

    @cached_property
    def examples(self) -> Examples[Example]:
        """The training examples as text."""
        return self._load(self.data.train, which="training")

    @cached_property
    def train(self) -> EncodedExamples:
        """The training examples as tokens."""
        encoded = self._encoded_all
        rows = selected(encoded.rows, self._learned)
        if self.data.packing:
            rows = stored(pack(rows, length=self.max_length), on_disk=self.data.streaming)
        return EncodedExamples(rows=rows, truncated=encoded.truncated)

    @cached_property
    def held_out(self) -> Examples[Example]:
        """The held-out examples as text."""
        data = self.data
        if data.validate:
            examples = self._load(data.train, which="validation")
        elif data.eval:
            examples = self._load(data.eval, which="held out")
        else:
            return Examples()
        if data.scoring != "likelihood":
            check_judges(examples, allow_code_execution=data.allow_code_execution)
            self._max_prompt()  # answers have room, or this is told before any training
        return examples

    def kinds(self) -> list[str]:
        """Return the task or the file that each training example comes from."""
        if self.data.packing:
            raise EvaError("a packed row has examples of several kinds; leave out measure.sampling or data.packing.")
        names = [sys.intern(example.task) for example in self.examples]  # one string for all of a kind
        return [names[index] for index in self._learned]

    def outline(self) -> Outline:
        """Return what is known without weights and without a hub."""
        return outline(self)

    def load_model(self) -> Any:
        """Return the causal language model."""
        source = self.source
        model = load_model(
            source.name,
            gguf_file=source.gguf_file,
            dtype=source.dtype,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
        if self.data.packing:
            model.config.use_cache = False  # with a cache, transformers does not look for packed rows
            check_keeps_apart(model)
        return model

    def needs(self, model: Any) -> Needs:
        """Return what the model needs: its pretrained head, no new one."""
        return Needs(
            counts_tokens=True,
            task_type="CAUSAL_LM",
            row_mask=row_mask if self.data.packing else None,
            learned_mask=learned_mask if self.data.packing else None,
            arguments={"train_sampling_strategy": "group_by_length"} if self.data.bucketing else {},
        )

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return rows of tokens as a padded batch."""
        return self._collator(rows)

    def evaluate(
        self,
        model: Any,
        *,
        limit: int | None = None,
        bf16: bool = False,
        progress: bool = True,
        journal: Journal | None = None,
    ) -> Scores:
        """Score a model on held-out completions; a journal knows what was scored before."""
        data = self.data
        return evaluate(
            model,
            self.held_out[:limit],
            self.tokenizer,
            scoring=data.scoring,
            sampling=Sampling(
                max_new_tokens=data.max_new_tokens,
                temperature=data.temperature,
                top_p=data.top_p,
                samples=data.samples,
                seed=self.seed,
            ),
            max_length=self.max_length,
            max_prompt=self._max_prompt(),
            batch_tokens=data.eval_batch_tokens,
            bf16=bf16,
            progress=progress,
            dropped=self.held_out.dropped,
            journal=journal,
        )

    def preview(self, n: int) -> Preview:
        """Return the first examples, decoded from their tokens; what is learned stands between ⟦ and ⟧."""
        examples = (self.examples if self.data.train else self.held_out)[:n]
        templates = [example.template for example in examples]
        return preview(self._encoded(examples).rows, self.tokenizer, templates=templates)

    def summary(self) -> str:
        """Return how many examples, from where, how many rows were dropped or cut."""
        cut, n_examples = self.train.truncated, len(self.examples)
        share = f" ({cut / n_examples:.1%})" if cut else ""
        emptied = n_examples - len(self._learned)
        share += f", {emptied:,} of them dropped: nothing that is learned was left" if emptied else ""
        packed = f", packed into {len(self.train):,} rows" if self.data.packing else ""
        return f"{self.examples.summary()}, {cut:,} longer than {self.max_length} tokens{share}{packed}"

    def facts(self) -> dict[str, Any]:
        """Return the counts for the record."""
        return {
            "train": len(self.examples),
            "train_dropped": self.examples.dropped,
            "train_shortened": self.train.truncated,
            "train_emptied": len(self.examples) - len(self._learned),
            **({"train_rows": len(self.train)} if self.data.packing else {}),
            "held_out": len(self.held_out),
        }

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer, and the template of the prompts if all examples have the same."""
        self.tokenizer.save_pretrained(folder)
        templates = {example.template for example in self.examples}
        if len(templates) == 1:
            PromptTemplate(text=templates.pop()).save(folder)

    def check_saved(self, folder: Path) -> None:
        """Check nothing: any text can be scored."""

    @cached_property
    def _encoded_all(self) -> EncodedExamples:
        return self._encoded(self.examples, on_disk=self.data.streaming)

    @cached_property
    def _learned(self) -> list[int]:
        """The training examples that still have something to learn after they were cut."""
        kept = [index for index, row in enumerate(self._encoded_all.rows) if set(row["labels"][1:]) - {IGNORED}]
        if not kept:
            raise EvaError(
                f"nothing that is learned stands within the first {self.max_length} tokens of any example; set a "
                "larger data.max_length, or data.truncation to left."
            )
        return kept

    @cached_property
    def _collator(self) -> Collator:
        return Collator(self.tokenizer)

    def _encoded(self, examples: Sequence[Example], *, on_disk: bool = False) -> EncodedExamples:
        data = self.data
        return encode_examples(
            examples,
            self.tokenizer,
            max_length=self.max_length,
            train_on_prompt=data.train_on_prompt,
            truncation=data.truncation,
            on_disk=on_disk,
        )

    def _max_prompt(self) -> int:
        """Return the longest prompt after which an answer has room."""
        new = self.data.max_new_tokens
        room = (self.positions or self.max_length + new) - new
        if self.data.scoring != "likelihood" and room < 1:
            raise EvaError(f"data.max_new_tokens is {new}, but the model reads {self.positions} tokens in all.")
        return max(1, min(self.max_length, room))

    def _load(
        self, sources: Sequence[str], *, which: Literal["training", "validation", "held out"]
    ) -> Examples[Example]:
        data = self.data
        return load_examples(
            sources,
            held_out=which == "held out",
            chat=data.chat,
            folder=data.folder,
            format=data.format,
            tokenizer=self.tokenizer,
            seed=self.seed,
            on_disk=data.streaming,
            **data.reading(which),
        )
