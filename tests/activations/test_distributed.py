"""Measuring in several gloo processes: the same spectra in all, equal to one process on all the data.

Starting processes is slow, so each number of processes is started once and runs all scenarios, one after the other.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import evatune
from evatune.pca.subspace import principal_angles

N_BATCHES, ROWS, WIDTH, K = 8, 64, 32, 8
NEVER_STOP = {"tau": None, "min_gain": None}

SCENARIOS = {
    "exact": {"backend": "exact", **NEVER_STOP},
    "sketch": {"backend": "sketch", **NEVER_STOP},
    "uneven exact": {"backend": "exact", **NEVER_STOP},
    "uneven sketch": {"backend": "sketch", **NEVER_STOP},
    "data parallel": {"backend": "exact", **NEVER_STOP},
    "batch cap": {"max_batches": 2, **NEVER_STOP},
    "converged": {"tau": 0.01, "min_gain": None},
    "failure": NEVER_STOP,
    "after the failure": {"backend": "exact", **NEVER_STOP},
    "no rows": NEVER_STOP,
}
UNEVEN = {2: [range(N_BATCHES), []], 4: [[0, 1, 2, 3], [4], [5, 6, 7], []]}


class Tiny(nn.Module):
    """Two inputs: one shared by two layers, one behind a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.query(x) * self.key(x)))


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


def all_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = torch.arange(1, WIDTH + 1) ** -1.0
    return [torch.randn(ROWS, WIDTH, generator=generator) * scales + 3.0 for _ in range(N_BATCHES)]


def shard(scenario: str, rank: int, size: int) -> list[torch.Tensor]:
    if scenario == "no rows":
        return []
    indices = UNEVEN[size][rank] if scenario.startswith("uneven") else range(rank, N_BATCHES, size)
    batches = all_batches()
    return [batches[index] for index in indices]


def failing(batches):
    yield batches[0]
    raise RuntimeError("the disk is gone")


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    for scenario, options in SCENARIOS.items():
        batches = shard(scenario, rank, size)
        loader = failing(batches) if scenario == "failure" and rank == 1 else batches
        model = tiny_model()
        if scenario == "data parallel":
            model = nn.parallel.DistributedDataParallel(model)
        try:
            spectra = evatune.measure(model, loader, n_components=K, progress=False, **options)
            spectra.save(f"{folder}/{scenario}/{rank}")
        except Exception as error:
            Path(f"{folder}/{scenario}-{rank}.error").write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    size, folder = request.param, tmp_path_factory.mktemp("processes")
    mp.spawn(work, args=(size, str(folder)), nprocs=size, join=True)

    def of(scenario: str):
        errors = {
            rank: path.read_text() for rank in range(size) if (path := folder / f"{scenario}-{rank}.error").exists()
        }
        spectra = [evatune.Spectra.load(folder / scenario / str(rank)) for rank in range(size) if rank not in errors]
        return spectra, errors

    of.size = size
    return of


@pytest.mark.parametrize("scenario", [name for name, options in SCENARIOS.items() if "backend" in options])
def test_all_processes_end_with_the_spectra_of_all_the_data(results, scenario):
    spectra, errors = results(scenario)
    assert not errors
    backend = SCENARIOS[scenario]["backend"]
    alone = evatune.measure(tiny_model(), all_batches(), backend=backend, n_components=K, progress=False, **NEVER_STOP)
    for name, spectrum in spectra[0].items():
        for other in spectra[1:]:
            assert torch.equal(other[name].components, spectrum.components)
            assert torch.equal(other[name].singular_values, spectrum.singular_values)
            assert torch.equal(other[name].mean, spectrum.mean)
            assert other[name].total_variance == spectrum.total_variance
        assert spectrum.n_rows == N_BATCHES * ROWS
        assert spectrum.total_variance == pytest.approx(alone[name].total_variance, rel=1e-5)
        torch.testing.assert_close(spectrum.mean, alone[name].mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(spectrum.singular_values, alone[name].singular_values, rtol=1e-3, atol=1e-4)
        angles = principal_angles(spectrum.components[:4], alone[name].components[:4])
        assert float(angles.max()) < (1e-3 if backend == "exact" else 0.05)


def test_a_cap_is_a_cap_for_each_process(results):
    spectra, errors = results("batch cap")
    assert not errors
    assert {spectrum.stopped for spectrum in spectra[0].values()} == {"batch cap"}
    assert {spectrum.n_rows for spectrum in spectra[0].values()} == {2 * results.size * ROWS}


def test_processes_stop_together_when_all_inputs_are_done(results):
    spectra, errors = results("converged")
    assert not errors
    assert {spectrum.stopped for spectrum in spectra[0].values()} == {"converged"}
    assert {spectrum.n_rows for spectrum in spectra[0].values()} == {2 * results.size * ROWS}


def test_one_failing_process_ends_all_with_an_error_and_none_hangs(results):
    spectra, errors = results("failure")
    assert not spectra
    assert errors.pop(1) == "RuntimeError: the disk is gone"
    assert all(text.startswith("EvaError: process 1 failed while measuring") for text in errors.values())


def test_no_rows_anywhere_is_an_error_in_all(results):
    _, errors = results("no rows")
    assert len(errors) == results.size
    assert all(text.startswith("EvaError: there was no batch to measure") for text in errors.values())


def test_what_is_sent_depends_on_meetings_and_width_but_not_on_rows(results):
    spectra, _ = results("exact")
    settings = spectra[0].settings
    assert settings["processes"] == results.size
    n_meetings = {2: 4, 4: 3}[results.size]  # after 1, 2, 4 steps, and the end where it is later
    per_meeting = 2 * (4 * WIDTH * WIDTH + 8 * 4 * WIDTH)
    assert n_meetings * 2 * 4 * WIDTH * WIDTH * 0.7 < settings["bytes_sent"] < n_meetings * (per_meeting + 3000)
