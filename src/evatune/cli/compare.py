"""`evatune compare`: all runs of a sweep, chosen on validation data and compared on test data."""

from __future__ import annotations

import argparse

from evatune.cli.options import answer, say, terminal_width

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
    group.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="what does the runs (default: local)"
    )
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="runs at a time (default: 1 or all GPUs; ray: all there is room for)",
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="processor threads of each process (default: its share)"
    )
    group.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes of each run, one GPU each (default: 1)"
    )
    group.add_argument(
        "--gpus", type=int, default=0, metavar="N", help="GPUs that local workers share; ray: of each run"
    )
    group.add_argument("--limit", type=int, metavar="N", help="do at most N runs now; the same command goes on")
    group.add_argument("--again", action="store_true", help="repeat the runs that were refused or failed")
    group.add_argument("--dry-run", action="store_true", help="say how many runs there are, and how long they take")
    group.add_argument("--force", action="store_true", help="add to the results of another version of evatune")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.compare.board import Board
    from evatune.compare.command import n_workers, open_engine, open_sweep
    from evatune.compare.forecast import forecast
    from evatune.compare.loop import compare
    from evatune.compare.standing import standings

    sweep = open_sweep(args.sweep, output=args.output)
    if args.dry_run:
        workers = n_workers(args.workers, gpus=args.gpus, processes=args.processes)
        expected = forecast(sweep, workers=workers)
        answer(args, text=expected.text(), content=expected.to_json())
        return
    engine = open_engine(
        sweep,
        engine=args.engine,
        workers=args.workers,
        threads=args.threads,
        gpus=args.gpus,
        processes=args.processes,
    )
    results = compare(sweep, engine, limit=args.limit, again=args.again, force=args.force, say=say)
    standing = standings(results)
    board = Board(rows=standing.rows)
    width = terminal_width()
    text = "\n\n".join(filter(None, [standing.text(width=width), board.means_text(width=width)]))
    answer(args, text=text, content=standing.to_json() | {"means": board.shown_means})
