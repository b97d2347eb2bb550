"""`evatune table`: a table of the results of a sweep, or of spectra."""

from __future__ import annotations

import argparse

from evatune.cli.options import add_view_options, answer, say, terminal_width, view_options
from evatune.exhibits import TABLES, listing

SUMMARY = "print a table of results or spectra"
USAGE = "NAME FOLDER..."
DESCRIPTION = f"""
Print a table, made of a folder of results of `evatune compare`, or of folders of spectra. Tables of adapters are made
of results of a sweep with `keep: adapters`.

tables:
{listing(TABLES)}
"""
EXAMPLES = """
examples:
  evatune table scores results/first
  evatune table paired results/first --against lora --format markdown
  evatune table budget spectra --rank 16 --rhos 1 1.5 2 --format latex
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("name", metavar="NAME", help="one of the tables above")
    formats = ("text", "markdown", "latex", "csv")
    parser.add_argument("--format", choices=formats, default="text", help="how it is written (default: text)")
    add_view_options(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.exhibits import find_exhibit, make
    from evatune.exhibits.view import View
    from evatune.files import check_writable, write_text

    exhibit = find_exhibit(args.name, TABLES, kind="table", task=args.task)
    if args.save:
        check_writable(args.save, overwrite=args.overwrite)
    table = make(exhibit, View(**view_options(args)))
    width = None if args.save else terminal_width()
    text = table.text(width=width) if args.format == "text" else getattr(table, args.format)()
    if args.save:
        say(f"saved     {write_text(args.save, text + chr(10))}")
    answer(args, text=text, content=table.to_json())
