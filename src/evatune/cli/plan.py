"""`evatune plan`: from spectra to ranks, without the model."""

from __future__ import annotations

import argparse

from evatune.cli.options import add_options, answer, given_options, say
from evatune.settings import Planning

SUMMARY = "redistribute ranks from measured spectra"
USAGE = "SPECTRA"
DESCRIPTION = """
Give each target of a model its rank and alpha: the components that explain most variance over all targets share a
budget of rank times the number of targets. Only the folder of spectra is needed, neither model nor data, and it takes
milliseconds, so try ranks, rho and metrics freely. Without --rank and --rho, those of the measurement are taken.
"""
EXAMPLES = """
examples:
  evatune plan spectra
  evatune plan spectra --rank 8 --rho 1.5 --metric max --plot ranks.png
  evatune plan spectra --save plan.json --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("spectra", metavar="SPECTRA", help="folder that `evatune measure` wrote")
    add_options(parser.add_argument_group("plan"), Planning)
    group = parser.add_argument_group("output")
    group.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    group.add_argument("--plot", metavar="FILE", help="draw the ranks, layers by matrices (.png, .svg, .pdf)")
    group.add_argument("--overwrite", action="store_true", help="replace these files if they exist")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.files import check_writable, write_json
    from evatune.spectra import Spectra

    given = given_options(args)
    Planning(**given)  # a wrong value is told before the spectra are read
    for path in filter(None, (args.save, args.plot)):
        check_writable(path, overwrite=args.overwrite)
    if args.plot:
        from evatune.report.style import check_format

        check_format(args.plot)
    spectra = Spectra.load(args.spectra)
    measured = {name: spectra.settings[name] for name in ("rank", "rho") if spectra.settings.get(name) is not None}
    plan = spectra.plan(settings=Planning(**measured | given))
    answer(args, text=plan.table(), content=plan.to_json())
    if args.save:
        say(f"saved     {write_json(args.save, plan.to_json(), indent=2)}")
    if args.plot:
        from evatune.report.figures import rank_heatmap

        rank_heatmap(plan, path=args.plot)
        say(f"drew      {args.plot}")
