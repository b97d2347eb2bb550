"""`evatune methods`: what can be written after `--method`."""

from __future__ import annotations

import argparse
import shutil
import textwrap

from evatune.cli.options import answer
from evatune.methods import EXAMPLES as COMBINATIONS
from evatune.methods import METHODS, OPTIONS, Method
from evatune.tables import text_table

SUMMARY = "list the methods that --method takes"
USAGE = ""
DESCRIPTION = """
List the ways to start fine-tuning, whether they look at data before training and change the base weights, and the
options that go behind a plus.
"""
EXAMPLES = """
examples:
  evatune methods
  evatune finetune recipe.yaml --method eva+dora --output runs/eva-dora
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command: there are none."""


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    width = min(shutil.get_terminal_size().columns, 110)
    rows = [[name, _data(row), "yes" if row.changes_base else "", row.idea] for name, row in METHODS.items()]
    table = text_table(["method", "data", "changes base", "idea"], rows, width=width)
    options = text_table(["option", "what it does"], [[name, row.idea] for name, row in OPTIONS.items()], width=width)
    alone = [name for name, row in METHODS.items() if len(row.refuses) == len(OPTIONS)]
    notes = [
        f"for example {', '.join(COMBINATIONS)}",
        f"without options: {', '.join(alone)}; without qlora also what changes the base or needs its gradient",
    ]
    text = "\n\n".join([table, options, "\n".join(textwrap.fill(note, width) for note in notes)])
    content = {
        "methods": {
            name: {
                "idea": row.idea,
                "needs_batches": row.needs_batches,
                "needs_gradients": row.needs_gradients,
                "changes_base": row.changes_base,
                "refuses": sorted(row.refuses),
            }
            for name, row in METHODS.items()
        },
        "options": {name: row.idea for name, row in OPTIONS.items()},
    }
    answer(args, text=text, content=content)


def _data(row: Method) -> str:
    """Return whether a method looks at data, and whether labels must be there for a loss."""
    if row.needs_gradients:
        return "labels"
    return "yes" if row.needs_batches else ""
