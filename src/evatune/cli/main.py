"""`evatune`: reads the command, runs it, and turns every expected failure into one line and an exit code.

Exit codes: 0 done, 1 something that the message explains, 2 wrong usage, 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from evatune import __version__, launch
from evatune.cli.options import HelpFormatter
from evatune.errors import EvaError, EvaWarning, near_misses
from evatune.files import json_text
from evatune.interruption import interrupt
from evatune.recipe import MEANT, find_setting

# In the order of a run. The modules are imported only when needed: `evatune --help` must not wait for PyTorch.
COMMANDS = (
    "collect",
    "preview",
    "measure",
    "plan",
    "init",
    "finetune",
    "compare",
    "table",
    "figure",
    "report",
    "evaluate",
    "generate",
    "methods",
)
IN_EACH_PROCESS = ("measure", "init", "finetune", "evaluate")
"""Commands that several processes run together; the others run in the first process alone."""


_MEANT_COMMANDS = {"train": "finetune", "tune": "finetune", "eval": "evaluate", "run": "finetune", "chat": "generate"}
"""Commands of other programs, and what they are called here."""
_NOISY = ("bitsandbytes", "torchao", "torch.utils._pytree", "math_verify")
"""Loggers of libraries that warn of what users of this program can do nothing about."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="evatune",
        description="Explained Variance Adaptation (EVA): data-driven initialization and rank allocation for LoRA.",
        epilog="`evatune COMMAND --help` explains a command. A run in one line:\n"
        "  evatune finetune --model MODEL --data train.jsonl --output runs/first",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"evatune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name in COMMANDS:
        module = importlib.import_module(f"evatune.cli.{name}")
        command = commands.add_parser(
            name,
            usage=f"evatune {name} {module.USAGE} [options]",
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments, by default those of the process.

    Returns:
        The exit code.
    """
    with launch.only_first_prints():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(words: list[str]) -> int:
    parser = build_parser()
    if not words:
        parser.print_help(sys.stderr)
        return 2
    return _run(_parsed(parser, words))


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Return what the words mean; wrong usage ends the program and names what may have been meant."""
    if words[0] == "help":
        words = [*words[1:2], "--help"]
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        meant = _MEANT_COMMANDS.get(words[0])
        hint = f" (did you mean {meant!r}?)" if meant else near_misses(words[0], COMMANDS)
        parser.error(f"unknown command {words[0]!r}{hint}; commands are {', '.join(COMMANDS)}")
    args, unknown = parser.parse_known_args([_hyphenated(word) for word in words])
    if unknown:
        option = unknown[0].partition("=")[0]
        path = MEANT.get(option.lstrip("-").replace("-", "_"))
        meant = find_setting(path).option if path else "--" + option.lstrip("-")
        if meant in args.parser._option_string_actions:
            args.parser.error(f"unknown argument {unknown[0]!r} (did you mean {meant!r}?)")
        known = [option for option in args.parser._option_string_actions if option.startswith("--")]
        args.parser.error(f"unknown argument {unknown[0]!r}{near_misses(option, known)}")
    return args


def _run(args: argparse.Namespace) -> int:
    """Run a command and return the exit code; what went wrong is said in one sentence."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    is_common = args.command in IN_EACH_PROCESS
    if not is_common:
        if launch.launched_as() > 0:
            return 0
        launch.go_alone()
    try:
        together = launch.together() if is_common else contextlib.nullcontext()
        with _terminated_as_interrupted(), together, _results_alone(args), _warnings_as_lines():
            args.run(args)
        sys.stdout.flush()
    except EvaError as error:
        return _fail(args, str(error))
    except BrokenPipeError:  # `evatune plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(args, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        if not launch.another_ended():  # else the launcher ends all because of that
            _fail(args, "interrupted")
        return 130
    except Exception:
        if not launch.another_ended():
            raise
        return _fail(args, "another process has ended, so this one ends too; the message of that one says why.")
    return 0


def _hyphenated(word: str) -> str:
    """Return an option with hyphens in its name, which may be written with underscores as in recipes."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[a-z][a-z0-9._-]*", name) else word


@contextlib.contextmanager
def _results_alone(args: argparse.Namespace) -> Iterator[None]:
    """With `--json`, keep standard output for the one object: what libraries print there goes to standard error."""
    args.standard_output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        yield


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print a warning of this program as a line like all others, without its place in the code."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, EvaWarning):
            print(f"warning   {message}", file=sys.stderr)
        else:
            others(message, category, *place, **options)

    with warnings.catch_warnings():
        others, warnings.showwarning = warnings.showwarning, show
        yield


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: what was measured or trained is saved, as a cluster's scheduler asks for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(args: argparse.Namespace, message: str) -> int:
    with _not_terminated():
        if not launch.says_first(message):
            return 1
        is_first = launch.launched_as() == 0
        print(f"evatune: {message}", file=sys.stderr if is_first else sys.__stderr__, flush=True)
        if args.json and not getattr(args, "answered", False):  # one object, also if what was saved has been told
            print(json_text({"error": message}), file=sys.stdout if is_first else sys.__stdout__, flush=True)
    return 1


@contextlib.contextmanager
def _not_terminated() -> Iterator[None]:
    """Let SIGTERM wait: a launcher sends it to all when one process ends, which may not be the one that tells why."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
