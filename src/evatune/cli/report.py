"""`evatune report`: the results of a sweep as one HTML page."""

from __future__ import annotations

import argparse

from evatune.cli.options import answer

SUMMARY = "write the results of a sweep as one HTML page"
USAGE = "RESULTS"
DESCRIPTION = """
Write one self-contained HTML file about a folder of results of `evatune compare`: scores and their statistics, figures
with their numbers, every run, and what failed. It needs no network and no other file.
"""
EXAMPLES = """
examples:
  evatune report results/first
  evatune report results/first --save page.html --against lora
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("results", metavar="RESULTS", help="folder that `evatune compare` wrote")
    parser.add_argument("--save", metavar="FILE", help="the page (default: report.html in the folder, replaced)")
    parser.add_argument("--score", metavar="NAME", help="the metric that counts (default: the sweep's or the headline)")
    parser.add_argument("--against", metavar="METHOD", help="the method that others are compared with (default: lora)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from pathlib import Path

    from evatune.exhibits.page import write_results_page
    from evatune.exhibits.view import View
    from evatune.files import check_writable

    view = View(folders=(args.results,), score=args.score, against=args.against)
    path = check_writable(args.save, overwrite=args.overwrite) if args.save else Path(args.results) / "report.html"
    write_results_page(view, path)
    answer(args, text=f"page      {path}", content={"page": str(path)})
