"""The task of understanding: a language model with a new head learns the classes of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from evatune.models import load_model, load_tokenizer
from evatune.tasks.examples import Examples, gather
from evatune.tasks.scores import Scores
from evatune.tasks.settings import ModelSettings
from evatune.tasks.task import Needs, Preview
from evatune.tasks.understanding.evaluation import evaluate
from evatune.tasks.understanding.examples import EncodedTexts, Labelled, classes_of, encode_texts, find_columns
from evatune.tasks.understanding.settings import UnderstandingData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_task(data: UnderstandingData, *, model: ModelSettings, seed: int) -> Understanding:
    """Return the task; see `evatune.tasks.open_task`."""
    return Understanding(data=data, source=model, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Understanding:
    """Texts and their classes for a language model with a new head; see `evatune.tasks.task.Task`."""

    data: UnderstandingData
    source: ModelSettings
    seed: int

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model; one without a padding token pads with its end token."""
        tokenizer = load_tokenizer(
            self.source.name,
            gguf_file=self.source.gguf_file,
            revision=self.source.revision,
            trust_remote_code=self.source.trust_remote_code,
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def examples(self) -> Examples[Labelled]:
        """The training texts."""
        return self._load(self.data.train, limit=self.data.max_train_examples, split=self.data.train_split)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers."""
        return classes_of(self.examples)

    @cached_property
    def train(self) -> EncodedTexts:
        """The training texts as tokens."""
        return self._encoded(self.examples)

    @cached_property
    def held_out(self) -> EncodedTexts:
        """The held-out texts as tokens."""
        return self._encoded(self._held_out_texts)

    def kinds(self) -> list[str]:
        """Return the class of each training text."""
        return [example.label for example in self.examples]

    def load_model(self) -> Any:
        """Return the language model with a head for the classes of the training texts."""
        model = load_model(
            self.source.name,
            gguf_file=self.source.gguf_file,
            dtype=self.source.dtype,
            revision=self.source.revision,
            trust_remote_code=self.source.trust_remote_code,
            head="sequence-classification",
            labels=self.classes,
        )
        if model.config.pad_token_id is None:  # decoders read their last token that is not padding
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def needs(self, model: Any) -> Needs:
        """Return what the model needs: the modules outside the pretrained part are its head."""
        heads = [
            name
            for name, module in model.named_children()
            if name != model.base_model_prefix and any(True for _ in module.parameters())
        ]
        return Needs(task_type="SEQ_CLS", heads=tuple(heads))

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return rows of tokens as a padded batch, with labels of shape (rows,)."""
        return dict(self.tokenizer.pad(list(rows), return_tensors="pt"))

    def evaluate(self, model: Any, *, limit: int | None = None, bf16: bool = False, progress: bool = True) -> Scores:
        """Score a model on held-out texts."""
        rows, dropped = self.held_out.rows[:limit], self._held_out_texts.dropped
        return evaluate(model, rows, self.collate, dropped=dropped, bf16=bf16, progress=progress)

    def preview(self, n: int) -> Preview:
        """Return the first texts, decoded from their tokens, and the classes, which are learned, after an arrow."""
        content = [
            {
                "text": str(self.tokenizer.decode(row["input_ids"], clean_up_tokenization_spaces=False)),
                "label": self.classes[row["labels"]],
                "number": row["labels"],
                "tokens": len(row["input_ids"]),
            }
            for row in self.train.rows[:n]
        ]
        shown = [
            f"── example {number}: {row['tokens']} tokens, the class is learned ⟦ ⟧\n"
            f"{row['text']} → ⟦{row['label']}⟧ (number {row['number']})"
            for number, row in enumerate(content, start=1)
        ]
        return Preview(text="\n\n".join(shown), content=content)

    def summary(self) -> str:
        """Return how many texts, of how many classes, from where, how many rows were dropped or cut."""
        cut = f"{self.train.truncated:,} longer than {self.data.max_length} tokens"
        return f"{self.examples.summary()}, {len(self.classes)} classes, {cut}"

    def facts(self) -> dict[str, Any]:
        """Return the counts for the record."""
        sizes = Counter(example.label for example in self.examples)
        return {
            "train": len(self.train),
            "train_dropped": self.examples.dropped,
            "train_shortened": self.train.truncated,
            "classes": {name: sizes[name] for name in self.classes},
            "held_out": len(self.held_out),
        }

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    @cached_property
    def _held_out_texts(self) -> Examples[Labelled]:
        if not self.data.eval:
            return Examples()
        return self._load(self.data.eval, limit=self.data.max_eval_examples, split=self.data.eval_split)

    def _encoded(self, examples: Examples[Labelled]) -> EncodedTexts:
        return encode_texts(examples, self.tokenizer, classes=self.classes, max_length=self.data.max_length)

    def _load(self, sources: Sequence[str], *, limit: int | None, split: str) -> Examples[Labelled]:
        return gather(
            sources,
            find_columns,
            limit=limit,
            seed=self.seed,
            split=split,
            hub_config=self.data.hub_config,
            columns=self.data.columns,
        )
