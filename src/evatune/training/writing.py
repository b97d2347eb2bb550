"""Generating text with a language model and an optional adapter, with the prompt template of its training."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from evatune.adapters.attach import load_adapter
from evatune.errors import EvaError
from evatune.hardware import best_device
from evatune.models import load_model, load_tokenizer
from evatune.models.prompts import PromptTemplate
from evatune.training.origin import check_model


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a model wrote."""

    prompt: str
    """What the model read, template included."""
    text: str
    """The answer."""
    tokens: int
    """Its tokens."""
    seconds: float
    """Time that they took."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A language model that is ready to answer prompts."""

    model: Any
    tokenizer: Any
    template: PromptTemplate

    def write(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        stream: bool = False,
    ) -> Written:
        """Answer a prompt.

        Args:
            prompt: what the user wrote; the template goes around it.
            max_new_tokens: longest answer.
            temperature: randomness; 0 takes the most probable token each time.
            top_p: sample from the most probable tokens that have this share together.
            seed: of sampling.
            system: system message of a chat template.
            stream: also print the answer on standard output while it is written.

        Raises:
            EvaError: the prompt is empty, or a value is out of range.
        """
        check_options(prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        text = self.template.render(prompt, self.tokenizer, system=system)
        written_already = self.template.text is None  # by the chat template
        inputs = self.tokenizer(text, add_special_tokens=not written_already, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        )
        pad = self.tokenizer.pad_token_id
        started = time.perf_counter()
        set_seed(seed)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
                **sampling,
            )
        answer = output[0, inputs["input_ids"].shape[1] :]
        return Written(
            prompt=text,
            text=self.tokenizer.decode(answer, skip_special_tokens=True),
            tokens=len(answer),
            seconds=round(time.perf_counter() - started, 3),
        )


def check_options(prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, **rest: Any) -> None:
    """Check what `Writer.write` takes, before a model is loaded.

    Raises:
        EvaError: the prompt is empty, or a value is out of range.
    """
    if not prompt.strip():
        raise EvaError("the prompt is empty; give it as an argument or on standard input.")
    if max_new_tokens < 1:
        raise EvaError(f"max_new_tokens is {max_new_tokens}, but must be at least 1.")
    if not 0 <= temperature < float("inf"):
        raise EvaError(f"temperature is {temperature:g}, but must be a number of at least 0.")
    if not 0 < top_p <= 1:
        raise EvaError(f"top_p is {top_p:g}, but must be greater than 0 and at most 1.")


def open_writer(
    model: str | None = None,
    *,
    adapter: str | Path | None = None,
    raw: bool = False,
    force: bool = False,
    dtype: str = "float32",
    **where: Any,
) -> Writer:
    """Load a language model, an adapter, and the template that its prompts were trained with.

    Args:
        model: as for `load_model`; by default the one that the adapter was made for.
        adapter: folder of a PEFT adapter.
        raw: take prompts as they are. Otherwise the template of the adapter's or the model's folder is used, else the
            tokenizer's chat template, if it has one.
        force: put the adapter also on another model than the one that it was made for.
        dtype: type of the weights.
        where: `gguf_file`, `revision` and `trust_remote_code` of `load_model`.

    Raises:
        EvaError: no model can be told, or something cannot be loaded.
    """
    name = model or _base_model(adapter)
    template = PromptTemplate.load(adapter) if adapter is not None else PromptTemplate.load(name)
    beside = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(adapter) if beside and adapter else load_tokenizer(name, **where)
    if raw:
        template = PromptTemplate()
    elif template is None:
        template = PromptTemplate(text=None) if getattr(tokenizer, "chat_template", None) else PromptTemplate()
    loaded: Any = load_model(name, dtype=dtype, **where)
    if adapter is not None:
        if not force:
            check_model(adapter, loaded)
        loaded = load_adapter(loaded, adapter)
    return Writer(model=loaded.to(best_device()).eval(), tokenizer=tokenizer, template=template)


def _base_model(adapter: str | Path | None) -> str:
    if adapter is None:
        raise EvaError("no model was given; pass --model, or --adapter to use the model it was made for.")
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise EvaError(f"{adapter} holds no adapter: it has no adapter_config.json.")
    config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if not name:
        raise EvaError(f"the adapter in {adapter} does not say which model it was made for; pass --model.")
    return str(name)
