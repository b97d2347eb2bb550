"""What a measurement holds beside the model: its states, and no activation of a batch that has passed."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from tests import fake_device
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from evatune import estimate, measure
from evatune.pca import many
from evatune.pca.cost import components_bytes

BATCH, LENGTH, WIDTH = 16, 64, 128
RULES = {"none": {"tau": None, "min_gain": None}, "both": {"tau": 0.99, "min_gain": 1e-9}}


def bytes_alive():
    """Return the bytes of all tensors, each storage once."""
    gc.collect()
    storages = [one.untyped_storage() for one in gc.get_objects() if type(one) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def llama(*, n_layers=1, width=WIDTH):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model():
    return llama()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(64, (BATCH, LENGTH), generator=generator)} for _ in range(6)]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_no_activation_outlives_its_batch(model, batches, backend, rules):
    seen, alive = [], []

    def note(module, args, output):
        tensors = [one for one in (*args, output) if isinstance(one, torch.Tensor) and one.is_floating_point()]
        seen.extend(weakref.ref(tensor) for tensor in tensors)

    def loader():
        for batch in batches:
            alive.append(sum(reference() is not None for reference in seen))
            yield batch

    for module in model.modules():
        module.register_forward_hook(note)
    measure(model, loader(), backend=backend, n_components=4, progress=False, **rules)
    assert len(seen) > 50 and alive == [0] * len(batches)


@pytest.mark.filterwarnings("ignore:the components of")  # of random weights, few components do not hold much
@pytest.mark.parametrize("backend", ["exact", "sketch", "incremental"])
def test_between_batches_there_are_as_many_bytes_as_estimated(model, batches, backend):
    """Neither rows nor copies of them are left: those of one input take more than the tolerance here."""
    told = estimate(model, backend=backend, n_components=4, batch_size=BATCH, length=LENGTH)
    before, held = bytes_alive(), []

    def loader():
        for batch in batches:
            held.append(bytes_alive() - before)
            yield batch

    measure(model, loader(), backend=backend, n_components=4, progress=False, **RULES["both"])
    rows_bytes = BATCH * LENGTH * WIDTH * 4
    assert told.initial_bytes / 2 < held[1] and max(held) < told.state_bytes + told.cached_bytes + rows_bytes / 4


def peak_of(run):
    """Return the most bytes that were allocated at a time, above those at the beginning."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.on_cpu("it brings a device of its own, whose memory is that of the CPU")
@pytest.mark.filterwarnings("ignore:the components of")
def test_an_accelerator_holds_states_components_and_one_group_of_factorizations(monkeypatch):
    """A pass and a group are not there at the same time, and the eigenpairs of all sketches are never."""
    n_layers, k, width = 8, 4, 256
    options = {"backend": "sketch", "n_components": k, "tolerance": None}
    with fake_device.fake_device() as device:
        model = llama(n_layers=n_layers, width=width).to(device)
        generator = torch.Generator("cpu").manual_seed(0)
        batches = [{"input_ids": torch.randint(64, (1, 16), generator=generator, device="cpu")} for _ in range(6)]
        told = estimate(LlamaForCausalLM(model.config), **options, batch_size=1, length=16)
        components = n_layers * components_bytes(k, 5 * width)
        group = max(kind.initial_bytes for kind in told.kinds) * 6
        monkeypatch.setattr(many, "ACCELERATOR_BYTES", 1)
        bare = peak_of(lambda: model(batches[0]["input_ids"].to(device)))
        peak = peak_of(lambda: measure(model, batches, progress=False, tau=1 - 1e-9, min_gain=1e-9, **options))
    assert told.initial_bytes < peak < told.initial_bytes + components + max(group, bare)
