"""When measuring ends, why, and what bad input it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from evatune import EvaError, EvaWarning, StreamingPCA, measure
from evatune.activations.input_state import InputState
from evatune.activations.run import Run
from evatune.activations.stopping import Finding, begin, decide, find, is_check, weigh
from evatune.settings import Stopping

D = 12


class Endless:
    """Batches without an end that count how many were taken."""

    def __init__(self, batches):
        self.batches, self.taken = batches, 0

    def __iter__(self):
        for batch in itertools.cycle(self.batches):
            self.taken += 1
            yield batch


def rows(n, *, seed=0, d=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * 2.0 ** -torch.arange(d)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))


FIRST = {"target_modules": ["0"], "progress": False, "n_components": 4}


def test_the_cap_ends_endless_data_and_takes_no_batch_more(linear):
    data = Endless([rows(20, seed=i) for i in range(5)])
    spectra = measure(linear, data, max_batches=7, tau=None, min_gain=None, **FIRST)
    assert data.taken == 7
    assert (spectra["0"].stopped, spectra["0"].n_batches, spectra["0"].n_rows) == ("batch cap", 7, 140)


@pytest.mark.parametrize("min_gain", [None, 1e-9])
def test_a_cosine_of_one_ends_at_the_cap(linear, min_gain):
    data = Endless([rows(20, seed=i) for i in range(50)])
    spectra = measure(linear, data, max_batches=12, tau=1.0, min_gain=min_gain, **FIRST)
    assert data.taken == 12 and spectra["0"].stopped == "batch cap"


def test_batches_with_fewer_rows_than_components_come_to_an_end(linear):
    data = Endless([rows(2, seed=i) for i in range(50)])
    spectra = measure(linear, data, max_batches=40, rank=2, rho=2.0, target_modules=["0"], progress=False)
    assert spectra["0"].n_rows >= 4 and data.taken <= 40
    assert spectra["0"].components.shape == (4, D)


@pytest.mark.parametrize("size", [1, 3])
def test_a_plan_is_asked_for_before_there_are_rows_enough(build, size, batches_for):
    """The first checks come when fewer rows than components were seen."""
    batches = [{"input_ids": b["input_ids"][:1, :size]} for b in batches_for("llama", 40)]
    spectra = measure(build("llama"), batches, rank=8, rho=2.0, max_batches=40, progress=False)
    assert all(s.n_rows == s.n_batches * size for s in spectra.inputs.values())
    assert {s.components.shape[0] for s in spectra.inputs.values()} == {16}


def test_a_first_batch_that_is_all_masked_is_no_end(build, batches_for):
    batches = batches_for("llama", 6)
    batches[0]["labels"][:] = -100
    batches[3]["attention_mask"][:] = 0
    spectra = measure(build("llama"), batches, use_label_mask=True, rank=2, rho=2.0, progress=False, tau=None)
    kept = sum(
        int((b["labels"][b["attention_mask"] == 1] != -100).sum()) for b in batches[: spectra.settings["n_batches"]]
    )
    assert {s.n_rows for s in spectra.inputs.values()} == {kept}


def test_the_rule_of_the_paper_ends_it(linear):
    data = Endless([rows(400, seed=i) for i in range(64)])
    spectra = measure(linear, data, tau=0.99, min_gain=None, **FIRST)
    assert spectra["0"].stopped == "converged" and data.taken == spectra["0"].n_batches < 64


def test_a_stricter_cosine_needs_more_batches(linear):
    counts = [
        measure(linear, [rows(30, seed=i) for i in range(64)], tau=tau, min_gain=None, **FIRST)["0"].n_batches
        for tau in (0.9, 0.999, 0.999999)
    ]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_a_smaller_share_of_components_needs_fewer_batches(linear):
    flat = [torch.randn(30, D, generator=torch.Generator().manual_seed(i)) for i in range(64)]
    for batch in flat:
        batch[:, 0] *= 10
    counts = [
        measure(linear, flat, tau=0.995, delta=delta, min_gain=None, **FIRST)["0"].n_batches for delta in (0.25, 1.0)
    ]
    assert counts[0] < counts[1]


def test_the_rule_on_unseen_rows_ends_it(linear):
    data = Endless([rows(300, seed=i) for i in range(64)])
    spectra = measure(linear, data, tau=None, min_gain=0.01, **FIRST)
    assert spectra["0"].stopped == "accurate" and data.taken == spectra["0"].n_batches < 64


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_the_gain_that_is_foretold_is_the_one_that_more_data_bring(backend, seed):
    """Scored on many fresh rows: components of 24 batches against those of 12, and what the check at 12 had said."""
    deviations = torch.arange(1, 201) ** -0.25
    generator = torch.Generator().manual_seed(seed)
    state, rule = InputState(pca=StreamingPCA(16, backend=backend)), Stopping()
    components, foretold = {}, {}
    for n_batches in range(1, 25):
        state.pca.partial_fit(torch.randn(700, 200, generator=generator) * deviations)
        if is_check(n_batches):
            state.reason = None
            weigh(state, rule, per_doubling=2)
            decide({"input": state}, {"input": find(state, rule, n_needed=16)}, rule)
            components[n_batches], foretold[n_batches] = state.pca.components_, state.gain
            state.reason = None
            begin(state, rule, per_doubling=2)
    assert foretold[8] is None, "6 to 8 batches are fewer rows than a gain is measured on"
    fresh = torch.randn(20000, 200, generator=generator) * deviations
    captured = {n: float((fresh @ components[n].T).square().sum()) for n in (12, 24)}
    gain = 1 - captured[12] / captured[24]
    assert gain > 0.004
    assert 0.7 * gain < foretold[12] < 1.4 * gain


@pytest.mark.parametrize("n_processes", [1, 2, 5])
def test_several_processes_gain_less_by_their_number(n_processes):
    """The states are merged at the end: p processes have p times the rows, and the next doubling gains 1 / p of it."""
    state, rule = InputState(pca=StreamingPCA(4)), Stopping(min_gain=0.004)
    energies_2 = torch.tensor([100.0, 96.0], dtype=torch.float64)
    found = Finding(energies_2=energies_2, n_rows=3000, n_rows_before=3000, n_processes=n_processes)
    decide({"input": state}, {"input": found}, rule)
    assert state.gain == pytest.approx(0.04 * 3000 / (2 * 6000) / n_processes)
    assert (state.reason == "accurate") == (n_processes > 2)


def test_no_new_rows_are_no_sign_of_having_settled(linear):
    """An expert that gets no row in a batch has the very same components before and after it."""
    spectra = measure(linear, [rows(20), *([rows(0)] * 30)], **FIRST, min_gain=None)
    assert (spectra["0"].stopped, spectra["0"].n_rows) == ("data exhausted", 20)


def test_all_inputs_go_on_until_the_last_is_done(linear):
    spectra = measure(
        linear, [rows(40, seed=i) for i in range(64)], **FIRST | {"target_modules": ["0", "2"]}, tau=0.995
    )
    assert len({s.n_rows for s in spectra.inputs.values()}) == 1


def test_the_checks_are_noted(linear):
    spectra = measure(linear, [rows(40, seed=i) for i in range(10)], tau=None, min_gain=None, **FIRST)
    notes = spectra.history
    assert [note["batch"] for note in notes] == sorted({note["batch"] for note in notes})
    assert all(note["rows"] == 40 * note["batch"] for note in notes)
    assert [note["seconds"] for note in notes] == sorted(note["seconds"] for note in notes)


def test_checks_grow_rare():
    assert [n for n in range(70) if is_check(n)] == [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert [n for n in range(70) if is_check(n, per_doubling=1)] == [1, 2, 4, 8, 16, 32, 64]


def test_a_rank_says_how_many_components_are_kept(linear):
    data = [rows(60)]
    assert measure(linear, data, target_modules=["0"], rank=3, rho=1.5, progress=False).n_components == 5
    assert measure(linear, data, target_modules=["0"], rank=3, n_components=9, progress=False).n_components == 9
    assert measure(linear, data, target_modules=["0"], progress=False).n_components == D, "no more than features"


def test_inputs_narrower_than_the_components_keep_what_they_have(linear):
    with torch.no_grad():
        spectra = measure(linear, [rows(60)], rank=16, rho=2.0, progress=False)
    assert spectra["0"].components.shape == (D, D)
    plan = spectra.plan(16, 2.0)
    assert plan.ranks == {"0": D, "2": D} and plan.budget == 32 and plan.total == 2 * D


@pytest.mark.parametrize(
    "data", [pytest.param([], id="empty list"), pytest.param(iter(()), id="generator that is used up")]
)
def test_no_batch_is_an_error(linear, data):
    with pytest.raises(EvaError, match="no batch to measure: the iterable is empty, or a generator that is used up"):
        measure(linear, data, **FIRST)


def test_all_rows_masked_is_an_error(build, batches_for, quiet):
    batches = batches_for("llama")
    for batch in batches:
        batch["labels"][:] = -100
    with pytest.raises(EvaError, match="all rows of all 3 batches are masked; check attention_mask and labels"):
        measure(build("llama"), batches, use_label_mask=True, **quiet)


def test_fewer_rows_than_components_in_all_batches_together_is_an_error(linear):
    with pytest.raises(EvaError, match="6 rows in 2 batches are fewer than the 8 components asked for; give more"):
        measure(linear, [rows(3), rows(3)], target_modules=["0"], n_components=8, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0}, "tau is 0.0, but must be greater than 0 and at most 1"),
        ({"tau": 1.01}, "tau is 1.01, but must be greater than 0 and at most 1"),
        ({"tau": float("nan")}, "tau is nan, but must be a number or none"),
        ({"delta": 0.0}, "delta is 0.0, but must be greater than 0"),
        ({"delta": 2}, "delta is 2.0, but must be greater than 0 and at most 1"),
        ({"min_gain": 0.0}, "min_gain is 0.0, but must be greater than 0 and less than 1"),
        ({"rank": 0}, "rank is 0, but must be at least 1"),
        ({"rank": 2.5}, "rank is 2.5, but must be a whole number or a mapping from names to whole numbers or none"),
        ({"rho": 0.5}, "rho is 0.5, but must be at least 1"),
        ({"rho": float("nan")}, "rho is nan, but must be a number"),
        ({"rho": float("inf"), "rank": 4}, "rho is inf, but must be a number"),
        ({"max_batches": 0}, "max_batches is 0, but must be at least 1"),
        ({"n_components": 0}, "n_components is 0, but must be at least 1"),
        ({"n_components": 4, "rank": 4, "rho": 2.0}, "n_components is 4, but rank 4 with rho 2 needs at least 8"),
        ({"backend": "exakt"}, "backend is 'exakt', but must be one of .* .did you mean 'exact'"),
        ({"dtype": "float61"}, "dtype is 'float61', but must be one of auto, .* or none .did you mean 'float16'"),
        ({"dtype": torch.int8}, "dtype is 'int8', but must be one of auto, float32"),
        ({"max_batch": 2}, r"evatune\.measure has no option 'max_batch' .did you mean 'max_batches'"),
        ({"metric": "ration", "rank": 2}, "metric is 'ration', but must be one of .* .did you mean 'ratio'"),
    ],
)
def test_settings_out_of_range_are_refused_before_any_batch_is_taken(linear, settings, message):
    data = Endless([rows(20)])
    with pytest.raises(EvaError, match=message):
        measure(linear, data, **{"target_modules": ["0"], "progress": False} | settings)
    assert data.taken == 0


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "a batch must be a mapping, a tensor or a tuple that starts with one, got str; pass forward="),
        (3, "got int"),
        ((), "got tuple"),
        ({}, "the batch has no entries, but the model's forward takes"),
        ({"pixels": torch.zeros(1)}, "the batch has 'pixels', but the model's forward takes input"),
    ],
)
def test_batches_that_no_model_takes_are_refused(linear, batch, message):
    with pytest.raises(EvaError, match=message):
        measure(linear, [batch], **FIRST)


@pytest.mark.parametrize("name", ["tau", "delta", "min_gain"])
def test_the_rules_check_themselves(name):
    with pytest.raises(EvaError, match=f"{name} is -1.0, but must be greater than 0"):
        Stopping(**{name: -1.0})


def test_an_input_that_never_varies_is_measured_and_gets_least():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            return self.a(x) + self.b(torch.full_like(x, 0.1))

    spectra = measure(
        Constant(), [rows(50, seed=i) for i in range(3)], target_modules=["a", "b"], rank=4, progress=False
    )
    assert spectra["b"].total_variance == 0.0 and not spectra["b"].explained_variance_ratio.any()
    assert spectra.plan(4, 2.0).ranks == {"a": 8, "b": 0}


def test_unreached_targets_are_named_once_though_there_are_many_checks(linear):
    model = nn.ModuleDict({"a": linear, "b": nn.Linear(2, 2)})
    model.forward = lambda x: linear(x)
    with pytest.warns(EvaWarning, match="1 of 3 targets got no input") as caught:
        measure(model, [rows(20, seed=i) for i in range(9)], rank=2, tau=None, progress=False)
    assert len(caught) == 1


def test_the_bar_shows_batches_and_converged_inputs(linear, capsys):
    measure(linear, [rows(40, seed=i) for i in range(5)], **FIRST | {"progress": True}, tau=None)
    shown = capsys.readouterr()
    assert shown.out == "" and "measuring" in shown.err and "0/1 inputs converged" in shown.err


def test_what_the_bar_says_of_a_large_model_fits_80_columns(monkeypatch, linear, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Run, "progress_text", lambda self: "128/224 inputs converged, 262,144 rows")
    measure(linear, [rows(40, seed=i) for i in range(5)], **FIRST | {"progress": True, "max_batches": 100}, tau=None)
    lines = [line.rstrip() for line in capsys.readouterr().err.split("\r") if "rows" in line]
    assert lines[-1].startswith("measuring ") and lines[-1].endswith(" left, 128/224 inputs converged, 262,144 rows")
    assert max(map(len, lines)) <= 80
