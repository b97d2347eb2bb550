"""`evatune table` and `evatune figure`: every name makes what it says."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from evatune.cli.main import main
from evatune.exhibits import ADAPTERS, FIGURES, RESULTS, SPECTRA, TABLES
from evatune.settings import Reason
from evatune.spectra import Spectra, Spectrum, Target


@pytest.fixture
def spectra(tmp_path):
    """Two folders of spectra of one made-up model."""
    folders = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        names = [f"layers.{layer}.{matrix}" for layer in range(3) for matrix in ("q", "o")]
        inputs = {
            name: Spectrum(
                components=torch.linalg.qr(torch.randn(16, 8, generator=generator))[0].T.contiguous(),
                singular_values=torch.rand(8, generator=generator).sort(descending=True).values * 10,
                mean=torch.zeros(16),
                total_variance=5.0,
                n_rows=100,
                n_batches=4,
                stopped=Reason.CONVERGED,
                backend="exact",
            )
            for name in names
        }
        targets = {name: Target(name=name, input=name, in_features=16, out_features=16) for name in names}
        history = [{"done": done, "inputs": 6, "seconds": 0.5 * done} for done in (0, 3, 6)]
        folder = tmp_path / f"spectra-{seed}"
        Spectra(targets=targets, inputs=inputs, history=history).save(folder)
        folders.append(str(folder))
    return folders


@pytest.fixture
def folders(results, spectra):
    return {RESULTS: [str(results())], SPECTRA: [*spectra, "--rank", "4"]}


@pytest.mark.parametrize("name", [name for name, row in TABLES.items() if row.of != ADAPTERS])
def test_every_table_is_written_in_every_format(folders, name, capsys):
    for form in ("text", "markdown", "latex", "csv"):
        assert main(["table", name, *folders[TABLES[name].of], "--format", form]) == 0
        assert capsys.readouterr().out.strip()
    assert main(["table", name, *folders[TABLES[name].of], "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["rows"] and content["name"] == name


@pytest.mark.parametrize("name", [name for name, row in FIGURES.items() if row.of != ADAPTERS])
def test_every_figure_is_drawn(folders, name, tmp_path, capsys):
    file = tmp_path / "figure.svg"
    assert main(["figure", name, *folders[FIGURES[name].of], "--save", str(file)]) == 0
    assert file.read_bytes().startswith(b"<?xml")


def test_names_and_files_that_do_not_fit_are_told(folders, tmp_path, capsys):
    assert main(["table", "score", *folders[RESULTS]]) == 1
    assert "there is no table 'score' (did you mean 'scores'" in capsys.readouterr().err
    assert main(["figure", "rates", "not/there", "--save", str(tmp_path / "x.gif")]) == 1  # before results are read
    assert "a figure cannot be written as 'x.gif'" in capsys.readouterr().err
    assert main(["figure", "movement", *folders[RESULTS], "--save", str(tmp_path / "x.svg")]) == 1
    assert "kept no adapters; run the sweep with `keep: adapters`" in capsys.readouterr().err
    assert main(["table", "scores", *folders[RESULTS], "--task", "sst2"]) == 1
    assert "table 'scores' is not of a single task; leave out --task sst2." in capsys.readouterr().err
    assert main(["table", "scores", str(tmp_path / "none")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["figure", "rates", *folders[RESULTS], "--task", "none", "--save", str(tmp_path / "x.svg")]) == 1
    assert "these results have no task 'none'; they have sst2, cola" in capsys.readouterr().err


def test_programs_get_mean_ranks_as_numbers(folders, capsys):
    assert main(["table", "budget", *folders[SPECTRA], "--json"]) == 0
    rows = {row["matrix"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["q"]["ρ=1"] == 4 and isinstance(rows["o"]["ρ=2"], float)


def test_one_measurement_is_similar_to_nothing(spectra, tmp_path, capsys):
    assert main(["figure", "similarity", spectra[0], "--save", str(tmp_path / "x.svg")]) == 1
    assert "similarity is that of two measurements at least" in capsys.readouterr().err


def test_a_table_is_saved(folders, tmp_path, capsys):
    file = tmp_path / "scores.tex"
    assert main(["table", "scores", *folders[RESULTS], "--format", "latex", "--save", str(file)]) == 0
    assert r"\textbf{0.8200 $\pm$ 0.0200}" in file.read_text()


def test_adapters_that_a_sweep_kept_are_compared(results, tmp_path, capsys):
    """Adapters as PEFT writes them; training moved every A of `eva` by a rank-one step of norm 2."""
    folder = results({"sst2": "accuracy"}, seeds=1)
    generator = torch.Generator().manual_seed(0)
    for method in ("lora", "eva ρ=1"):
        start = torch.randn(2, 5, generator=generator)
        step = torch.zeros(2, 5)
        step[0, 0] = 2.0 if method != "lora" else 1.0
        for part, matrix in (("initial_adapter", start), ("adapter", start + step)):
            target = folder / "runs" / "sst2" / method / "lr0.01-seed0" / part
            target.mkdir(parents=True)
            name = "base_model.model.layers.0.q.lora_{}.weight"
            tensors = {name.format("A"): matrix, name.format("B"): torch.ones(3, 2)}
            save_file(tensors, target / "adapter_model.safetensors")
    assert main(["table", "movement", str(folder), "--json"]) == 0
    cells = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert cells["lora"]["q"].endswith("/ 1") and cells["eva ρ=1"]["q"].endswith("/ 2")
    assert cells["eva ρ=1"]["q spectral norm"] == pytest.approx(2.0) and 0 < cells["lora"]["q cosine"] < 1
    for name in [name for name, row in TABLES.items() if row.of == ADAPTERS]:
        assert main(["table", name, str(folder)]) == 0
    for name in [name for name, row in FIGURES.items() if row.of == ADAPTERS]:
        assert main(["figure", name, str(folder), "--save", str(tmp_path / f"{name}.png")]) == 0


def test_a_folder_that_takes_no_page_is_told_before_anything_is_drawn(results, monkeypatch, capsys):
    folder = results()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("evatune.exhibits.every.write_results_page", lambda *a: pytest.fail("drawn"))
    assert main(["report", str(folder)]) == 1
    assert f"cannot write {folder}: {folder} is not a writable folder" in capsys.readouterr().err


def test_one_command_writes_the_page_and_every_table_and_figure(results, tmp_path, capsys):
    folder = results()
    assert main(["report", str(folder), "--files", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (folder / "report.html").is_file()
    tables = {path.name for path in (folder / "tables").iterdir()}
    assert {"scores.md", "scores.csv", "scores.tex", "steps-sst2.md", "steps-cola.md"} <= tables
    figures = {path.stem for path in (folder / "figures").iterdir()}
    of_tasks = {f"{name}-{task}" for name, row in FIGURES.items() if row.of_task for task in ("sst2", "cola")}
    assert figures | content["missing"].keys() >= of_tasks | {"critical-difference"}
    assert content["missing"]["movement-sst2"].endswith("run the sweep with `keep: adapters`.")
    assert len(content["files"]) == len(tables) + len(figures)
    assert "| method  | parameters |" in (folder / "tables" / "scores.md").read_text(encoding="utf-8")
    assert main(["report", str(folder), str(folder), "--save", str(tmp_path / "page.html")]) == 1
    assert "--save names one page, and 2 folders were given; leave it out." in capsys.readouterr().err
