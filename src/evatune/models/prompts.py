"""The template around a prompt: the same in training and at inference, saved beside the adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evatune.errors import EvaError
from evatune.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_NAME = "prompt.json"
"""The template's file in an adapter's or a model's folder."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Text around a prompt, or the tokenizer's chat template.

    Example:
        >>> PromptTemplate(text="Question: {prompt} Answer:").render("1 + 1?")
        'Question: 1 + 1? Answer:'
    """

    text: str | None = "{prompt}"
    """What the model reads, with `{prompt}` for the prompt; the answer follows directly. None: the chat template."""

    def render(
        self, prompt: str, tokenizer: PreTrainedTokenizerBase | None = None, *, system: str | None = None
    ) -> str:
        """Return the string that comes before the answer.

        Args:
            prompt: what the user wrote.
            tokenizer: needed for the chat template only; the string then contains its special tokens.
            system: the system message of the chat template.

        Raises:
            EvaError: a chat template is needed and missing, or a system message has no place.
        """
        if self.text is not None:
            if system:
                raise EvaError("a system message needs a chat template, and this model was trained with plain text.")
            return self.text.replace("{prompt}", prompt)
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise EvaError("the prompt is to be written with a chat template, and the tokenizer has none.")
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def save(self, folder: str | Path) -> Path:
        """Write the template into a folder."""
        return write_json(Path(folder) / FILE_NAME, {"template": self.text, "chat": self.text is None}, indent=2)

    @classmethod
    def load(cls, folder: str | Path) -> PromptTemplate | None:
        """Read the template of a folder; None where it has none.

        Raises:
            EvaError: the file is damaged.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(text=None if content["chat"] else str(content["template"]))
        except (ValueError, KeyError, TypeError) as error:
            raise EvaError(f"{path} is not a prompt template; delete it, or save the adapter again.") from error
