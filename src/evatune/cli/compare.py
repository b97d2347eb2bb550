"""`evatune compare`: all runs of a sweep, chosen on validation data and compared on test data."""

from __future__ import annotations

import argparse

from evatune.cli.options import add_options, answer, given_options, say, terminal_width
from evatune.settings import EngineSettings

SUMMARY = "run a sweep: choose on validation data, compare on test data"
USAGE = "SWEEP"
DESCRIPTION = """
Do all runs of a sweep: first every method with every learning rate and what else is searched, scored on validation
data, then each method at its chosen setting with several seeds, scored on test data. A run whose record is there is not
repeated, so the command goes on where it was interrupted.
"""
EXAMPLES = """
examples:
  evatune compare sweep.yaml --dry-run
  evatune compare sweep.yaml --workers 2 --threads 1 --output results/first
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("sweep", metavar="SWEEP", help="YAML file; docs/compare.md says what it holds")
    group = parser.add_argument_group("runs")
    group.add_argument("--output", metavar="FOLDER", help="folder of the results, instead of the sweep's")
    add_options(group, EngineSettings)
    group.add_argument("--limit", type=int, metavar="N", help="do at most N runs now; the same command goes on")
    group.add_argument("--again", action="store_true", help="repeat the runs that were refused or failed")
    group.add_argument("--dry-run", action="store_true", help="say how many runs there are, and how long they take")
    group.add_argument("--force", action="store_true", help="add to the results of another version of evatune")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.compare.board import Board
    from evatune.compare.command import open_engine, open_sweep
    from evatune.compare.forecast import forecast
    from evatune.compare.loop import compare
    from evatune.compare.standing import standings

    sweep, settings = open_sweep(args.sweep, output=args.output), EngineSettings(**given_options(args))
    if args.dry_run:
        expected = forecast(sweep, workers=settings.workers_here)
        answer(args, text=expected.text(), content=expected.to_json())
        return
    engine = open_engine(sweep, settings=settings)
    results = compare(sweep, engine, limit=args.limit, again=args.again, force=args.force, say=say)
    standing = standings(results)
    board = Board(rows=standing.rows)
    width = terminal_width()
    text = "\n\n".join(filter(None, [standing.text(width=width), board.means_text(width=width)]))
    answer(args, text=text, content=standing.to_json() | {"means": board.shown_means})
