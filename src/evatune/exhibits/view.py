"""What a figure or a table is made of: folders, and what of them is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evatune.compare.board import Board
from evatune.compare.differences import Compared, differences
from evatune.compare.results import RECORDS, RUNS, Record, Results
from evatune.compare.standing import standings
from evatune.errors import EvaError
from evatune.settings import Planning
from evatune.spectra import Spectra


@dataclass(frozen=True, kw_only=True)
class View:
    """Folders and options of one exhibit."""

    folders: tuple[str, ...]
    """One folder of results, or folders of spectra."""
    score: str | None = None
    """The metric of results; by default that of the sweep, which is each task's headline where it names none."""
    against: str | None = None
    """The method that others are compared with; by default plain LoRA."""
    task: str | None = None
    """The task of results that a figure shows; by default the first one."""
    rhos: tuple[float, ...] = (1.0, 1.5, 2.0)
    """Values of rho that spectra are planned with."""
    planning: Mapping[str, Any] = field(default_factory=dict)
    """How spectra are planned otherwise: fields of `evatune.settings.Planning`; by default rank and rho are those that
    the spectra were measured for."""

    @cached_property
    def results(self) -> Results:
        """The results.

        Raises:
            EvaError: there is more than one folder, or it holds none.
        """
        if len(self.folders) != 1:
            raise EvaError(f"this is made of one folder of results, and {len(self.folders)} were given.")
        folder = Path(self.folders[0])
        if not folder.is_dir():
            raise EvaError(f"there is no folder {folder}; name one that `evatune compare` wrote.")
        if not (folder / RECORDS).is_file():
            raise EvaError(f"{folder} holds no results of `evatune compare`: it has no {RECORDS}.")
        return Results(folder)

    @cached_property
    def board_so_far(self) -> Board:
        """The test scores of the results, also where no test run is done yet."""
        return Board(rows=standings(self.results, metric=self.metric).rows)

    @property
    def board(self) -> Board:
        """The test scores of the results.

        Raises:
            EvaError: there are none, or no such metric.
        """
        if not any(row.scores for row in self.board_so_far.rows):
            raise EvaError(f"{self.results.folder} holds no scores of test runs yet; run `evatune compare` to its end.")
        return self.board_so_far

    @cached_property
    def metric(self) -> str | None:
        """The metric of all tasks; None if it is each one's headline."""
        return self.score or self.results.metric

    @property
    def one_task(self) -> str:
        """The task that a figure shows.

        Raises:
            EvaError: the results have no such task.
        """
        tasks = self.board_so_far.tasks or self.board.tasks
        if self.task is not None and self.task not in tasks:
            raise EvaError(f"these results have no task {self.task!r}; they have {', '.join(tasks)}.")
        return self.task or tasks[0]

    @cached_property
    def runs(self) -> dict[tuple[str, str, str, str], list[Record]]:
        """All records by task, model, method and stage."""
        found: dict[tuple[str, str, str, str], list[Record]] = {}
        for record in self.results.records.values():
            found.setdefault((record["task"], record["model"], record["method"], record["stage"]), []).append(record)
        return found

    @cached_property
    def differences(self) -> list[Compared]:
        """How all methods differ from the one that they are compared with.

        Raises:
            EvaError: these results have no such method.
        """
        return differences(self.board, self.board.reference(self.against))

    def on(self, task: str) -> View:
        """Return the same view of another task; what was read and computed is not so again."""
        one = replace(self, task=task)
        vars(one).update(results=self.results, board_so_far=self.board_so_far)  # cached properties
        vars(one).update((name, value) for name, value in vars(self).items() if name in ("runs", "differences"))
        return one

    def test_runs(self, task: str) -> dict[str, list[Record]]:
        """Return the finished test runs of each method on a task."""
        rows = [row for method in self.board.methods if (row := self.board.at(method, task))]
        return {row.method: done for row in rows if (done := [r for r in row.records if r["state"] == "done"])}

    @cached_property
    def spectra(self) -> dict[str, Spectra]:
        """The spectra, by the names of their folders."""
        names = [Path(folder).name for folder in self.folders]
        labels = names if len(set(names)) == len(names) else list(self.folders)
        return {label: Spectra.load(folder) for label, folder in zip(labels, self.folders, strict=True)}

    @cached_property
    def plan_settings(self) -> Planning:
        """All options of plans of the first spectra."""
        measured = next(iter(self.spectra.values())).settings
        defaults = {name: measured[name] for name in ("rank", "rho") if measured.get(name) is not None}
        return Planning(**{**defaults, **self.planning})

    def adapters(self, task: str) -> Mapping[str, Mapping[int, tuple[Path, Path]]]:
        """Return the folders of the initial and the trained adapter of each test run, by method and seed.

        Raises:
            EvaError: the sweep kept none.
        """
        found: dict[str, dict[int, tuple[Path, Path]]] = {}
        for method, records in self.test_runs(task).items():
            for record in records:
                folder = self.results.folder / RUNS / record["name"]
                if (folder / "adapter").is_dir() and (folder / "initial_adapter").is_dir():
                    pair = folder / "initial_adapter", folder / "adapter"
                    found.setdefault(method, {})[record["seed"]] = pair
        if not found:
            raise EvaError(f"{self.results.folder} kept no adapters; run the sweep with `keep: adapters`.")
        return found
