"""The page of results: what it holds, and how it behaves in a browser, where one is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from evatune.cli.main import main
from evatune.exhibits.page import write_results_page
from evatune.exhibits.view import View
from evatune.report import page as page_module

PROBE = """
<script>
addEventListener("load", () => {
  const table = document.getElementById("table-scores");
  const first = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
  const click = (column) => table.tHead.rows[0].cells[column].querySelector("button").click();
  const found = { before: first(), scroll: document.documentElement.scrollWidth, width: innerWidth };
  click(0); found.up = first(); click(0); found.down = first(); click(2); found.scores = first();
  found.sort = table.tHead.rows[0].cells[2].getAttribute("aria-sort");
  const input = document.querySelector("#table-runs").closest("figure").querySelector("input");
  input.value = "refused"; input.dispatchEvent(new Event("input"));
  const runs = [...document.querySelectorAll("#table-runs tbody tr:not(.group)")];
  found.shown = runs.filter((row) => !row.hidden).length;
  found.told = input.parentElement.querySelector("output").textContent;
  input.value = "pissa on cola"; input.dispatchEvent(new Event("input"));  // the title of a group
  found.group = runs.filter((row) => !row.hidden).length;
  const sortRuns = (column) => document.querySelectorAll("#table-runs thead button")[column].click();
  sortRuns(2); sortRuns(2);
  const bodies = [...document.querySelectorAll("#table-runs tbody")];
  found.best = bodies[0].querySelector("th").textContent;
  found.inside = bodies.every((body) => body.rows[0].className === "group" && body.rows.length > 1);
  const links = [...document.querySelectorAll('a[href^="#"]')];
  found.links = links.length;
  found.dead = links.filter((link) => !document.getElementById(link.getAttribute("href").slice(1))).length;
  const cell = document.querySelector('#table-scores tbody a[href*="lora"]');
  cell.focus();
  found.focusable = document.activeElement === cell;
  cell.click();
  setTimeout(() => {  // after the hash has changed
    const target = document.querySelector(":target");
    found.rows = [...target.rows].slice(1).map((row) => row.cells[2].textContent);
    found.title = target.rows[0].textContent;
    found.seen = target.getBoundingClientRect().top < innerHeight && !target.hidden && !input.value;
    found.focused = document.activeElement === target || document.activeElement === document.body;
    document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
  }, 300);
});
</script>
"""


PAPER = """
<script>
addEventListener("load", () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const shown = (selector) => all(selector).filter((one) => one.checkVisibility());
  const found = {
    controls: shown(".filter, nav, details").length,
    tables: shown("table").length,
    cut: shown(".wide").filter((one) => getComputedStyle(one).overflowX !== "visible").length,
    lines: shown("td a").filter((one) => getComputedStyle(one).textDecorationLine !== "none").length,
    wide: shown("table, img").filter((one) => one.getBoundingClientRect().right > innerWidth).length,
  };
  document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
});
</script>
"""


@pytest.fixture
def page(results, tmp_path) -> Path:
    return write_results_page(View(folders=(str(results()),)), tmp_path / "page.html")


def test_the_page_holds_tables_figures_runs_and_failures(page):
    text = page.read_text(encoding="utf-8")
    for title in ("In short", "Scores", "sst2", "cola", "What failed", "All runs", "What was run"):
        assert f">{title}</h2>" in text
    assert '<nav aria-label="Contents"><a href="#part-1">In short</a> · <a href="#part-2">Scores</a>' in text
    assert "<h3>Interquartile means with bootstrap intervals</h3>" in text
    assert "this task has no such layers." in text
    assert "<strong>0.8200 ± 0.0200</strong></a>" in text and 'href="#runs-sst2-eva' in text
    assert "<h3>sst2: eva ρ=1 is best of 4, and better than lora beyond chance</h3>" in text
    assert "<code>lora</code> 0.7200 ± 0.0200: better by +0.1000, 95% interval" in text
    assert text.count("<img ") >= 8 and text.count("<details>") >= 6
    assert not re.search(r'(src|href)="(?!data:|#)[^"]*:', text)  # nothing from elsewhere


def test_a_page_elsewhere_leads_to_the_runs(results, tmp_path):
    folder = results({"sst2": "accuracy"})
    record = folder / "runs" / "sst2" / "lora" / "lr0.01-seed0" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    for file in (folder / "report.html", tmp_path / "pages" / "page.html"):
        file.parent.mkdir(exist_ok=True)
        text = write_results_page(View(folders=(str(folder),)), file).read_text(encoding="utf-8")
        assert (file.parent / re.search(r'href="([^"#]*run\.json)"', text)[1]).resolve() == record


def test_a_comparison_without_lora_has_a_page(results, tmp_path):
    folder = results({"sst2": "accuracy"})
    choices = [one for one in json.loads((folder / "choices.json").read_text()) if one["method"] != "lora"]
    (folder / "choices.json").write_text(json.dumps(choices))
    text = write_results_page(View(folders=(str(folder),)), tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'alt="training loss over the steps, sst2."' in text


def test_a_comparison_without_test_runs_shows_what_was_tried(results, tmp_path):
    folder = results({"sst2": "accuracy"})
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    tried = [json.loads(line) | {"stage": "validation"} for line in lines]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in tried))
    assert main(["report", str(folder), "--files"]) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "No test run is done yet: what follows was scored on validation data alone." in text
    assert "In short" not in text and 'alt="validation score over the learning rate, sst2."' in text
    assert (folder / "tables" / "settings.md").is_file() and not (folder / "tables" / "scores.md").exists()


def test_a_part_of_a_comparison_is_called_one(results, tmp_path):
    folder = results()
    choices = json.loads((folder / "choices.json").read_text())
    choices[0]["missing"] = 2
    (folder / "choices.json").write_text(json.dumps(choices))
    assert main(["report", str(folder)]) == 0
    assert "2 are still to be done, so this is a part of the comparison." in (folder / "report.html").read_text()


def test_colours_have_enough_contrast_in_light_and_dark():
    palettes = re.findall(r":root \{([^}]*)\}", page_module._STYLE)
    assert len(palettes) == 2
    for palette in palettes:
        colour = dict(re.findall(r"--(\w+): (#\w{6})", palette))
        for ink in ("ink", "muted", "accent"):
            assert contrast(colour[ink], colour["paper"]) >= 4.5
            assert contrast(colour[ink], colour["shade"]) >= 4.5


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_works_in_a_browser(page, width, tmp_path):
    found = found_in_browser(page.read_text(encoding="utf-8") + PROBE, width=width, folder=tmp_path)
    assert found["scroll"] <= found["width"] <= max(width, 500)  # nothing is wider than the window
    assert found["up"] == sorted(found["before"]) and found["down"] == found["up"][::-1]
    assert found["scores"][:2] == ["untuned", "pissa"] and found["sort"] == "ascending"
    assert found["shown"] == 2 and found["told"] == "2 of 26"  # one of each task
    assert found["group"] == 3
    assert found["best"] == "eva ρ=1 on sst2: 3 test runs, learning_rate 0.01" and found["inside"]
    assert found["title"] == "lora on sst2: 3 test runs, learning_rate 0.01"
    assert found["rows"] == ["0.7400", "0.7200", "0.7000"]  # as they were sorted before
    assert found["focusable"] and found["focused"] and found["seen"]
    assert found["links"] > 0 and found["dead"] == 0


@pytest.mark.slow
def test_a_sheet_of_paper_has_whole_tables_and_no_controls(page, tmp_path):
    """A window as wide as what can be printed on A4, with the rules for paper."""
    text = page.read_text(encoding="utf-8").replace("@media print", "@media all")
    found = found_in_browser(text + PAPER, width=690, folder=tmp_path)
    assert found == {"controls": 0, "tables": found["tables"], "cut": 0, "lines": 0, "wide": 0} and found["tables"] > 8


def found_in_browser(text: str, *, width: int, folder: Path) -> dict:
    """Return what a script at the end of a page writes into an element `found`."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium: apt-get install chromium")
    probed = folder / "probed.html"
    probed.write_text(text, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    done = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=120)
    assert ":CONSOLE" not in done.stderr  # no error, no warning
    return json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1])


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it."""
    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
