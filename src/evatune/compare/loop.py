"""`compare`: all runs of a sweep, on whatever engine, with the records of what became of them."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from evatune.compare.choosing import Choice, choose, score
from evatune.compare.engine import Engine, Job, Outcome
from evatune.compare.results import RUNS, SPECTRA, Record, Results, is_whole, record_of
from evatune.compare.runs import Cell, Run, cells
from evatune.compare.sweep import Sweep
from evatune.errors import EvaError
from evatune.tables import byte_size, duration

LEAST_DISK = 200 * 2**20
"""Bytes that must be free before a run is started."""


@dataclass(kw_only=True)
class Progress:
    """What the one line of progress tells."""

    say: Callable[[str], None]
    slots: int
    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def tell(self, record: Record, *, running: int, left: int) -> None:
        """Say what became of a run, and how many there still are."""
        self.counts[record["state"]] += 1
        if is_whole(record):
            self.seconds.append(record["wall_seconds"])
        counts = ", ".join(
            f"{self.counts[state]} {state}" for state in ("done", "refused", "failed") if self.counts[state]
        )
        mean = sum(self.seconds) / len(self.seconds) if self.seconds else None
        rest = f", {duration(mean * (left + running) / self.slots)} left" if mean is not None and left + running else ""
        after = record.get("after")
        result = record.get("reason", "")
        if after:
            value = after["metrics"][after["headline"]]
            result = f"{after['headline']} {'not finite' if value is None else f'{value:.4g}'}"
        self.say(f"[{counts}, {running} running, {left} waiting{rest}]  {record['name']}  {result}")


def compare(
    sweep: Sweep,
    engine: Engine,
    *,
    limit: int | None = None,
    again: bool = False,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Results:
    """Do the runs of a sweep whose records are not there yet.

    Stage one scores every searched setting of every method on validation data, stage two the chosen setting on test
    data. A grid whose best value is at its end grows first.

    Args:
        sweep: what to compare.
        engine: what does the runs; it is closed in the end.
        limit: do at most so many runs; the next call goes on.
        again: repeat the runs that were refused or failed.
        force: add to the results of another version of evatune.
        say: gets a line for each finished run.

    Returns:
        All records of the folder.

    Raises:
        EvaError: the sweep is wrong, or its folder holds something else, the disk is full, or the first run of a task
            lacks the sweep's metric.
        KeyboardInterrupt: Ctrl-C; finished runs are kept, and the next call goes on.
    """
    progress = Progress(say=say, slots=engine.slots)
    try:
        if limit is not None and limit < 0:
            raise EvaError(f"--limit is {limit}, but must be at least 0.")
        compared, results = cells(sweep), Results(sweep.output)
        if again:
            results.records = {name: record for name, record in results.records.items() if record["state"] == "done"}
        with results.writing(sweep.to_json(), force=force):
            (results.folder / RUNS).mkdir(exist_ok=True)
            while missing := [run for choice in _chosen(sweep, compared, results) for run in choice.missing]:
                left = None if limit is None else limit - progress.counts.total()
                if left is not None and left <= 0:
                    break
                try:
                    _do(missing[:left], sweep=sweep, results=results, engine=engine, progress=progress)
                except BaseException:  # Ctrl-C, a full disk: the tables are of everything that is done
                    _chosen(sweep, compared, results)
                    raise
    finally:
        engine.close()
    return results


def _chosen(sweep: Sweep, compared: list[Cell], results: Results) -> list[Choice]:
    """Return what is known of each cell, and write it beside the records."""
    choices = [choose(cell, results.find, metric=sweep.metric, widen=sweep.widen) for cell in compared]
    results.write_choices([choice.to_json(cell) for cell, choice in zip(compared, choices, strict=True)])
    return choices


def _do(runs: list[Run], *, sweep: Sweep, results: Results, engine: Engine, progress: Progress) -> None:
    """Do runs; of those that need the same spectra, the first one measures them and the others wait for it."""
    waiting = [(run, 1) for run in runs]
    measuring: set[str] = set()
    n_running = 0
    while waiting or n_running:
        ready = next((item for item in waiting if item[0].spectra_key not in measuring), None)
        if ready is not None and n_running < engine.slots:
            waiting.remove(ready)
            job = _job(*ready, results=results, engine=engine)
            measuring |= {job.spectra} if job.spectra else set()
            engine.start(job)
            n_running += 1
            continue
        for job, outcome in engine.finished():
            n_running -= 1
            measuring.discard(job.spectra or "")
            if outcome.state == "died" and job.tries < sweep.tries:
                waiting.insert(0, (job.run, job.tries + 1))
                continue
            record = _finish(job, outcome, results=results, keep=sweep.keep)
            progress.tell(record, running=n_running, left=len(waiting))
            score(record, sweep.metric)  # a metric that these data lack ends the sweep here, not at its end


def _job(run: Run, tries: int, *, results: Results, engine: Engine) -> Job:
    free = shutil.disk_usage(results.folder).free
    if free < LEAST_DISK:
        raise EvaError(
            f"{results.folder} has {byte_size(free)} of disk left, and a run needs {byte_size(LEAST_DISK)} at least; "
            "make room and give the command again: finished runs are kept."
        )
    folder = (results.folder / RUNS / run.name).absolute()
    key = run.spectra_key
    shared = (results.folder / SPECTRA / key).absolute() if key else None
    measured = shared if shared is not None and shared.is_dir() else None
    recipe = run.recipe_in(folder, spectra=measured, threads=engine.threads)
    return Job(
        run=run,
        folder=folder,
        recipe=recipe.to_dict(),
        spectra=key if measured is None else None,
        tries=tries,
        started=time.perf_counter(),
    )


def _finish(job: Job, outcome: Outcome, *, results: Results, keep: str) -> Record:
    """Write the record of a finished run, and remove what need not stay of its folder."""
    done = outcome.state == "done"
    reason = outcome.reason + (f", {job.tries} times" if outcome.state == "died" else "")
    record = record_of(
        job.run,
        results,
        state="failed" if outcome.state == "died" else outcome.state,
        seconds=time.perf_counter() - job.started,
        tries=job.tries,
        reason=reason,
        folder=job.folder if done else None,
    )
    if done and record["after"] is None:
        record |= {
            "state": "refused",
            "reason": "the recipe holds out nothing to score: set `eval` in its section data",
        }
    if done and job.spectra and (job.folder / "spectra").is_dir():
        shared = results.folder / SPECTRA / job.spectra
        shared.parent.mkdir(exist_ok=True)
        (job.folder / "spectra").rename(shared)
    results.add(record)
    kept = ("adapter", "initial_adapter", "model") if keep == "adapters" else ()
    for item in sorted(job.folder.iterdir()) if job.folder.is_dir() else ():
        if item.is_dir() and item.name not in kept:
            shutil.rmtree(item)
    return record
