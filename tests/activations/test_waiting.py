"""On an accelerator, the host waits for the device once a check, not once a batch or an input."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch
from tests import fake_device
from transformers import LlamaConfig, LlamaForCausalLM

import evatune
from evatune.activations.layers.convolution import ConvolutionType
from evatune.activations.processes.exchange import Processes
from evatune.activations.run import Run
from evatune.pca import StreamingPCA, many, widths
from evatune.pca.moving import moved

# Of random numbers, few components do not hold much.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the components of"),
    pytest.mark.on_cpu("it brings a device of its own, on which it counts"),
]


@pytest.fixture(autouse=True)
def device():
    with fake_device.fake_device() as found:
        yield found


def model_on(device, *, n_layers=1):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=320,
        intermediate_size=640,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval().to(device)


def batches(n, *, padded=True, device="cpu"):
    generator = torch.Generator("cpu").manual_seed(0)
    mask = torch.ones(4, 64, dtype=torch.long, device="cpu")
    if padded:
        mask[1, 40:] = 0
    for _ in range(n):
        tokens = torch.randint(0, 64, (4, 64), generator=generator, device="cpu")
        yield {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


def n_waits(model, n_batches, **options):
    fake_device.waits.clear()
    given = {name: options.pop(name) for name in ("padded", "device") if name in options}
    spectra = evatune.measure(model, batches(n_batches, **given), rank=8, progress=False, **options)
    counted = fake_device.waits.copy()
    fake_device.waits.clear()
    assert next(iter(spectra.inputs.values())).components.device.type == "cpu"
    return counted


RULES = {"none": {"tau": None, "min_gain": None}, "both": {"tau": 0.99, "min_gain": 1e-9}}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("backend", ["exact", "sketch"])
def test_the_host_waits_once_a_doubling_and_not_once_a_batch_or_an_input(device, backend, rules):
    small, large = model_on(device), model_on(device, n_layers=2)
    few = sum(n_waits(small, 5, backend=backend, padded=False, **rules).values())
    many = sum(n_waits(small, 7, backend=backend, padded=False, **rules).values())
    a_check_more = 16 if rules["tau"] else 0  # after the 6th batch
    assert many <= few + a_check_more
    wide = sum(n_waits(large, 5, backend=backend, padded=False, **rules).values())
    assert wide <= few + 4, "four inputs more; their sketches may get wider at other times"


@pytest.mark.parametrize("backend", ["exact", "sketch"])
def test_rows_are_added_without_waiting(device, backend):
    """The first rows of an input as well: all inputs of a model get theirs in one pass."""
    pca = StreamingPCA(4, backend=backend)
    rows = torch.randn(64, 320, device="cpu").to(device)
    fake_device.waits.clear()
    for _ in range(3):
        pca.add(rows)
    assert not fake_device.waits


@pytest.mark.parametrize("backend", ["exact", "sketch"])
def test_components_reach_the_host_with_one_copy_for_all_inputs(device, backend):
    model = model_on(device, n_layers=2)
    places = n_waits(model, 2, backend=backend, padded=False, **RULES["none"])
    beside = {place: count for place, count in places.items() if not place.startswith("pca/together")}
    assert [place.rpartition(" ")[2] for place in beside] == ["on_host"] and list(beside.values()) == [1]


class Alone(Processes):
    """The exchange of one process with itself."""

    def __init__(self) -> None:
        self.number, self.size, self.bytes_sent, self.device = 0, 1, 0, torch.device("cpu")

    @staticmethod
    def present() -> bool:
        return True

    def gather(self, tensor):
        return [tensor.clone()]


def test_processes_that_judge_together_wait_once_a_check_too(device, monkeypatch):
    monkeypatch.setattr(import_module("evatune.activations.measure"), "Processes", Alone)
    counts = []
    for n_layers in (1, 2):
        places = n_waits(model_on(device, n_layers=n_layers), 5, backend="exact", padded=False, **RULES["both"])
        counts.append(sum(n for place, n in places.items() if "lockstep" in place or "stopping" in place))
    assert counts[0] == counts[1] > 0


def test_padding_is_learned_once_for_each_input(device):
    model = model_on(device)
    of_padding = [sum(count for place, count in n_waits(model, n).items() if "padding" in place) for n in (2, 5)]
    assert of_padding == [4, 4]


def test_masks_on_the_device_are_read_once_a_batch(device):
    model = model_on(device)
    counts = [
        sum(count for place, count in n_waits(model, n, device=device).items() if "positions" in place) for n in (2, 5)
    ]
    assert counts == [2, 5], "the mask of each batch"


@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_what_is_measured_there_is_what_is_measured_on_the_cpu(device, backend):
    options = {"rank": 8, "progress": False, "max_batches": 4, "backend": backend, "state_device": None}
    there = evatune.measure(model_on(device), batches(4), **options)
    with torch.utils._python_dispatch._disable_current_modes():
        here = evatune.measure(model_on("cpu"), list(batches(4)), **options)
    assert list(there.inputs) == list(here.inputs)
    for key, spectrum in there.inputs.items():
        torch.testing.assert_close(spectrum.singular_values, here.inputs[key].singular_values, rtol=1e-3, atol=1e-4)
        assert spectrum.n_rows == here.inputs[key].n_rows


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("backend", ["exact", "sketch"])
def test_inputs_are_judged_group_by_group(device, monkeypatch, backend, rules):
    """Where an accelerator cannot factorize all inputs at once, only one group has its eigenpairs at any time."""
    known, done = [], Run._groups

    def groups(self):
        for group in done(self):
            yield group
            known.append(sum(getattr(one.pca._state, "_known", None) is not None for one in self.inputs.values()))

    monkeypatch.setattr(Run, "_groups", groups)
    model = model_on(device, n_layers=2)
    measure = partial(evatune.measure, rank=8, progress=False, backend=backend, **rules)
    at_once = measure(model, batches(7))
    assert max(known) == (8 if backend == "sketch" else 0)
    known.clear()
    monkeypatch.setattr(many, "ACCELERATOR_BYTES", 0)
    by_one = measure(model, batches(7))
    assert max(known) == (1 if backend == "sketch" else 0)
    assert len(known) >= 8 * 5, "batches 1, 2, 3, 4 and 6 leave work for each of 8 inputs"
    assert [entry["mean_gain"] for entry in by_one.history] == pytest.approx(
        [entry["mean_gain"] for entry in at_once.history], abs=1e-6
    )
    for key, spectrum in by_one.inputs.items():
        assert spectrum.stopped is at_once.inputs[key].stopped and spectrum.n_rows == at_once.inputs[key].n_rows
        torch.testing.assert_close(spectrum.singular_values, at_once.inputs[key].singular_values, rtol=1e-5, atol=1e-5)


def test_the_places_of_rows_are_copied_once_a_batch(device, monkeypatch):
    copied = []
    monkeypatch.setattr("evatune.activations.rows.moved", lambda *given: copied.append(given) or moved(*given))
    n_waits(model_on(device, n_layers=2), 5)
    assert len(copied) == 5


def test_patches_are_taken_without_waiting(device):
    mask = torch.ones(2, 9, dtype=torch.bool, device="cpu")
    mask[0, 3:] = False
    images = torch.randn(2, 4, 9, device="cpu").to(device)
    fake_device.waits.clear()
    (patches,) = ConvolutionType().rows(torch.nn.Conv1d(4, 6, 3, padding=1), images, [mask])
    assert not fake_device.waits and patches.shape == (4 + 9, 12)


def test_states_can_be_kept_on_the_cpu(device):
    spectra = evatune.measure(model_on(device), batches(3), rank=8, progress=False, state_device="cpu")
    assert {spectrum.n_rows for spectrum in spectra.inputs.values()} == {3 * (4 * 64 - 24)}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_wide_sketches_wait_in_main_memory_and_the_host_does_not(device, monkeypatch, rules):
    """What sketches take of an accelerator does not grow as they get wider, and all bits and waits stay."""
    monkeypatch.setattr(widths, "EXACT_UP_TO", 512)  # wider rows than these 1,024 features are never measured exactly
    torch.manual_seed(0)
    layers = [torch.nn.Linear(1024, 1024, device="cpu") for _ in range(3)]
    model = torch.nn.Sequential(*layers).to(device)
    generator = torch.Generator("cpu").manual_seed(0)
    deviations = torch.arange(1, 1025, device="cpu").rsqrt()
    rows = [torch.randn(300, 1024, generator=generator, device="cpu") * deviations for _ in range(4)]
    options = {"rank": 4, "rho": 1.0, "backend": "sketch", "tolerance": 1e-9, "progress": False, **rules}
    held, begin = [], Run.begin_batch

    def note(self):
        begin(self)
        matrices = [matrix for state in self.inputs.values() for matrix in state.pca.parkable()]
        held.append((sum(matrix.device_bytes for matrix in matrices), sum(matrix.nbytes for matrix in matrices)))

    monkeypatch.setattr(Run, "begin_batch", note)
    found = []
    for states_bytes in (many.STATES_BYTES, 0):
        monkeypatch.setattr(many, "STATES_BYTES", states_bytes)
        fake_device.waits.clear()
        spectra = evatune.measure(model, rows, **options)
        found.append((spectra, sum(fake_device.waits.values()), held[1:]))
        held.clear()
    (here, waits, all_here), (away, waits_away, some_here) = found
    assert all(held == all_bytes for held, all_bytes in all_here)
    begun = 3 * StreamingPCA(4, backend="sketch").cost(n_features=1024).initial_bytes
    assert some_here[-1][1] > 2 * begun and max(held for held, _ in some_here) <= begun
    assert waits_away == waits
    for key, spectrum in here.inputs.items():
        assert torch.equal(spectrum.components, away.inputs[key].components)
        assert torch.equal(spectrum.singular_values, away.inputs[key].singular_values)
        assert spectrum.stopped is away.inputs[key].stopped
