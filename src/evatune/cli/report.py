"""`evatune report`: the results of a sweep as one HTML page."""

from __future__ import annotations

import argparse

from evatune.cli.options import add_result_options, answer

SUMMARY = "write the results of a sweep as one HTML page"
USAGE = "RESULTS..."
DESCRIPTION = """
Write one self-contained HTML file about a folder of results of `evatune compare`: scores and their statistics, figures
with their numbers, every run, and what failed. It needs no network and no other file. With --files, every table and
figure of the results also becomes a file of its own.
"""
EXAMPLES = """
examples:
  evatune report results/first
  evatune report results/first --save page.html --against lora
  evatune report results/* --files
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="folders that `evatune compare` wrote")
    parser.add_argument("--save", metavar="FILE", help="the page (default: report.html in the folder, replaced)")
    parser.add_argument(
        "--files",
        action="store_true",
        help="also write all tables (Markdown, CSV, LaTeX) and figures (SVG) beside it",
    )
    add_result_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.exhibits.every import write_reports

    reports = write_reports(
        args.results,
        save=args.save,
        overwrite=args.overwrite,
        files=args.files,
        score=args.score,
        against=args.against,
    )
    answer(args, text=reports.text(), content=reports.to_json())
