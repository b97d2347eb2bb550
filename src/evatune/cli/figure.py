"""`evatune figure`: a figure of the results of a sweep, or of spectra."""

from __future__ import annotations

import argparse

from evatune.cli.options import add_view_options, answer, view_options
from evatune.exhibits import FIGURES, listing

SUMMARY = "draw a figure of results or spectra"
USAGE = "NAME FOLDER... --save FILE"
DESCRIPTION = f"""
Draw a figure, made of a folder of results of `evatune compare`, or of folders of spectra, and write it as .svg, .png or
.pdf. Figures of adapters are made of results of a sweep with `keep: adapters`.

figures:
{listing(FIGURES)}
"""
EXAMPLES = """
examples:
  evatune figure rates results/first --save rates.svg
  evatune figure rank-maps spectra --rank 16 --rhos 1 1.5 2 --save ranks.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("name", metavar="NAME", help="one of the figures above")
    add_view_options(parser, save_required=True)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.exhibits import find_exhibit, make
    from evatune.exhibits.view import View
    from evatune.files import check_writable
    from evatune.report.style import check_format, save

    exhibit = find_exhibit(args.name, FIGURES, kind="figure", task=args.task)
    check_format(args.save)
    check_writable(args.save, overwrite=args.overwrite)
    save(make(exhibit, View(**view_options(args))), args.save)
    answer(args, text=f"drew      {args.save}", content={"figure": args.name, "file": args.save})
