"""`evatune plan`: from spectra to ranks, without the model."""

from __future__ import annotations

import argparse
import json

from evatune.cli.options import answer, say

SUMMARY = "redistribute ranks from measured spectra"
USAGE = "SPECTRA"
DESCRIPTION = """
Give each target of a model its rank and alpha: the components that explain most variance over all targets share a
budget of rank times the number of targets. Only the folder of spectra is needed, neither model nor data, and it takes
milliseconds, so try ranks, rho and metrics freely.
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
    group = parser.add_argument_group("plan")
    group.add_argument("--rank", type=int, default=16, metavar="N", help="average rank (default: 16)")
    group.add_argument(
        "--rho", type=float, default=2.0, metavar="X", help="no target gets more than rho times rank (default: 2)"
    )
    group.add_argument(
        "--metric",
        default="ratio",
        metavar="{ratio,paper,raw,max,sum}",
        help="explained-variance metric by which components compete (default: ratio)",
    )
    group.add_argument(
        "--budget",
        default="components",
        metavar="{components,parameters}",
        help="what uniform ranks limit: components, or trainable parameters, of which a component of a wide matrix "
        "takes more (default: components)",
    )
    group.add_argument(
        "--train-a",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="A will be trained as well as B; otherwise only B counts as trainable parameters (default: true)",
    )
    group.add_argument(
        "--lora-alpha", type=float, default=1.0, metavar="X", help="alpha at the average rank (default: 1)"
    )
    group.add_argument("--use-rslora", action="store_true", help="the adapter is scaled by alpha / sqrt(rank)")
    group = parser.add_argument_group("output")
    group.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    group.add_argument("--plot", metavar="FILE", help="draw the ranks, layers by matrices (.png, .svg, .pdf)")
    group.add_argument("--overwrite", action="store_true", help="replace these files if they exist")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune.files import check_writable, write_text
    from evatune.spectra import Spectra

    for path in filter(None, (args.save, args.plot)):
        check_writable(path, overwrite=args.overwrite)
    spectra = Spectra.load(args.spectra)
    plan = spectra.plan(
        args.rank,
        args.rho,
        metric=args.metric,
        lora_alpha=args.lora_alpha,
        use_rslora=args.use_rslora,
        budget=args.budget,
        train_a=args.train_a,
    )
    if args.save:
        say(f"saved     {write_text(args.save, json.dumps(plan.to_json(), indent=2) + chr(10))}")
    if args.plot:
        plan.plot(args.plot)
        say(f"drew      {args.plot}")
    answer(args, text=plan.table(), content=plan.to_json())
