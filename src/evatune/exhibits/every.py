"""Every table and figure of a folder of results as files of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evatune.errors import EvaError
from evatune.exhibits import FIGURES, SPECTRA, TABLES, Exhibit, make
from evatune.exhibits.page import write_results_page
from evatune.exhibits.view import View
from evatune.files import check_takes_files, check_writable, write_text
from evatune.report.style import save

TABLE_FORMATS = {"md": "markdown", "csv": "csv", "tex": "latex"}
"""Methods of a table by the ending of the file."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written of one folder of results."""

    page: Path
    """The page."""
    files: tuple[Path, ...] = ()
    """The files of tables and figures."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Why there is none, by the name of the exhibit."""

    def text(self) -> str:
        """Return it for a terminal."""
        lines = [f"page      {self.page}"]
        if self.files:
            lines.append(f"files     {len(self.files)} in tables/ and figures/ beside it")
        return "\n".join([*lines, *(f"without   {name}: {why}" for name, why in self.missing.items())])

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"page": str(self.page), "files": list(map(str, self.files)), "missing": dict(self.missing)}


@dataclass(frozen=True, kw_only=True)
class Reports:
    """What was written of all folders."""

    written: Sequence[Written]

    def text(self) -> str:
        """Return it for a terminal."""
        return "\n".join(one.text() for one in self.written)

    def to_json(self) -> dict[str, Any]:
        """Return plain values: those of the folder, or a list of them under `reports`."""
        found = [one.to_json() for one in self.written]
        return found[0] if len(found) == 1 else {"reports": found}


def write_reports(
    folders: Sequence[str],
    *,
    save: str | None = None,
    overwrite: bool = False,
    files: bool = False,
    score: str | None = None,
    against: str | None = None,
) -> Reports:
    """Write the page of each folder of results.

    Args:
        folders: what `evatune compare` wrote.
        save: the page of a single folder, if it is not to be `report.html` in it.
        overwrite: replace this page.
        files: also write every table and figure, beside the page.
        score: the metric; by default the sweep's.
        against: the method that others are compared with; by default plain LoRA.

    Raises:
        EvaError: a folder holds no results, the page exists or cannot be written, or `save` is given for several
            folders.
    """
    if save and len(folders) > 1:
        raise EvaError(f"--save names one page, and {len(folders)} folders were given; leave it out.")
    written = []
    for folder in folders:
        view = View(folders=(folder,), score=score, against=against)
        page = check_writable(save, overwrite=overwrite) if save else Path(folder) / "report.html"
        if page.parent.is_dir():
            check_takes_files(page.parent)
        write_results_page(view, page)
        written.append(write_every_exhibit(view, page) if files else Written(page=page))
    return Reports(written=written)


def write_every_exhibit(view: View, page: Path) -> Written:
    """Write all tables and figures that results have, those of a task for each task.

    Args:
        view: the results.
        page: their page, whose folder gets `tables/` (Markdown, CSV, LaTeX) and `figures/` (SVG); files of the same
            names are replaced.

    Raises:
        EvaError: there are no results.
    """
    folder, tasks = page.parent, view.board_so_far.tasks
    files: list[Path] = []
    missing: dict[str, str] = {}
    for name, exhibit in TABLES.items():
        for label, table in _made(name, exhibit, view, tasks if exhibit.of_task else [None], missing).items():
            for ending, method in TABLE_FORMATS.items():
                files.append(write_text(folder / "tables" / f"{label}.{ending}", getattr(table, method)() + "\n"))
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, exhibit in FIGURES.items():
        for label, figure in _made(name, exhibit, view, tasks if exhibit.of_task else [None], missing).items():
            path = folder / "figures" / f"{label}.svg"
            save(figure, path)
            files.append(path)
    return Written(page=page, files=tuple(files), missing=missing)


def _made(
    name: str, exhibit: Exhibit, view: View, tasks: list[str] | list[None], missing: dict[str, str]
) -> dict[str, Any]:
    """Return an exhibit for each task by the name of its file; say why there is none."""
    found = {}
    for task in tasks if exhibit.of != SPECTRA else []:
        label = name if len(tasks) == 1 else f"{name}-{str(task).replace('/', '-').replace(' ', '-')}"
        try:
            found[label] = make(exhibit, view if task is None else view.on(task))
        except EvaError as error:
            missing[label] = str(error)
    return found
