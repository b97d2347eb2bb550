"""A model and the generators are left as they were found, whatever happens."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from evatune import EvaError, measure


class Trouble:
    """Batches that raise before the third one."""

    def __init__(self, batches, error):
        self.batches, self.error = batches, error

    def __iter__(self):
        yield from self.batches[:2]
        raise self.error


def photograph(model):
    """Everything about a model and the generators that must not change."""
    modules = list(model.modules())
    return {
        "training": [module.training for module in modules],
        "hooks": [
            [len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")] for module in modules
        ],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "weights": [float(parameter.detach().double().sum()) for parameter in model.parameters()],
        "versions": [parameter._version for parameter in model.parameters()],
        "use_cache": [m.config.use_cache for m in modules if hasattr(getattr(m, "config", None), "use_cache")],
        "adapters off": [m._disable_adapters for m in modules if hasattr(m, "_disable_adapters")],
        "active": [list(m.active_adapters) for m in modules if hasattr(m, "_disable_adapters")],
        "names": [name for name, _ in model.named_modules()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": [*np.random.get_state()[1].tolist(), np.random.get_state()[2]],
        "python": random.getstate(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "threads": torch.get_num_threads(),
    }


def wild(model):
    """Bring a model into a state of its own: parts in training mode, parts frozen, a hook, a cache."""
    model.train()
    next(iter(model.children())).eval()
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    list(model.modules())[5].register_forward_hook(lambda *args: None)
    return model


def plain(build):
    return wild(build("llama"))


def wrapped(build):
    return wild(get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)))


@pytest.mark.parametrize("make", [plain, wrapped])
def test_after_success(build, batches_for, quiet, make):
    model = make(build)
    before = photograph(model)
    measure(model, batches_for("llama"), **quiet)
    assert photograph(model) == before


@pytest.mark.parametrize("make", [plain, wrapped])
def test_after_an_exception_in_the_loader(build, batches_for, quiet, make):
    model = make(build)
    before = photograph(model)
    with pytest.raises(RuntimeError, match="disk on fire"):
        measure(model, Trouble(batches_for("llama"), RuntimeError("disk on fire")), **quiet)
    assert photograph(model) == before


@pytest.mark.parametrize("make", [plain, wrapped])
@pytest.mark.parametrize("at", [0, 2])
def test_after_an_exception_in_the_forward_pass(build, batches_for, quiet, make, at):
    model = make(build)
    before = photograph(model)
    count = [0]

    def forward(model, batch):
        count[0] += 1
        if count[0] > at:
            raise RuntimeError("out of memory")
        model(**batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        measure(model, batches_for("llama"), forward=forward, **quiet)
    assert photograph(model) == before


def test_after_an_exception_inside_the_model(build, batches_for, quiet):
    model, batches = plain(build), batches_for("llama")
    batches[1]["input_ids"][0, 0] = 10_000
    before = photograph(model)
    with pytest.raises(IndexError, match="out of range"):
        measure(model, batches, **quiet)
    assert photograph(model) == before


def test_after_bad_input(build, batches_for, quiet):
    model, batches = plain(build), batches_for("llama")
    before = photograph(model)
    for bad in ([], [{"text": "only"}], ["text"], [{k: v * 0 for k, v in batches[0].items()}]):
        with pytest.raises(EvaError, match=r"\w"):
            measure(model, bad, **quiet)
        assert photograph(model) == before


@pytest.mark.parametrize("make", [plain, wrapped])
def test_ctrl_c_gives_what_was_measured_so_far(build, batches_for, quiet, make):
    model = make(build)
    before = photograph(model)
    batches = batches_for("llama")
    spectra = measure(model, Trouble(batches, KeyboardInterrupt()), **quiet)
    assert photograph(model) == before
    assert {s.stopped for s in spectra.inputs.values()} == {"interrupted"}
    assert {s.n_batches for s in spectra.inputs.values()} == {2} and spectra.settings["n_batches"] == 2
    whole = measure(model, batches[:2], **quiet)
    for name in whole:
        assert torch.equal(spectra[name].components, whole[name].components)
        assert spectra[name].n_rows == whole[name].n_rows


@pytest.mark.parametrize("at", [1, 2, 3])
def test_ctrl_c_inside_the_model_is_the_same(build, batches_for, quiet, at):
    model = plain(build)
    loaded = [0]

    def counted():
        for batch in batches_for("llama"):
            loaded[0] += 1
            yield batch

    def interrupt(*args):
        if loaded[0] == at:  # a batch may take several passes
            raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    before = photograph(model)
    if at == 1:  # nothing whole was measured
        with pytest.raises(KeyboardInterrupt):
            measure(model, counted(), **quiet)
    else:
        spectra = measure(model, counted(), **quiet)
        assert {s.stopped for s in spectra.inputs.values()} == {"interrupted"}
        assert spectra.settings["n_batches"] == at - 1
        assert len(spectra) == 14
    assert photograph(model) == before
    handle.remove()


def test_ctrl_c_before_the_first_batch_is_ctrl_c(build, quiet):
    def batches():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        measure(build("llama"), batches(), **quiet)


def test_the_order_of_training_data_does_not_change(build, batches_for, quiet):
    """A loader that shuffles draws from the global generator: not so that the training after it sees another order."""
    batches = batches_for("llama")
    orders = []
    for measured in (False, True):
        torch.manual_seed(7)
        loader = DataLoader(batches, batch_size=None, shuffle=True)
        if measured:
            measure(build("llama"), loader, **quiet)
        orders.append([int(batch["input_ids"].sum()) for batch in loader])
    assert orders[0] == orders[1]


def test_batches_are_not_changed(build, batches_for, quiet):
    batches = batches_for("llama")
    copies = [{name: tensor.clone() for name, tensor in batch.items()} for batch in batches]
    measure(build("llama"), batches, use_label_mask=True, **quiet)
    for batch, copy in zip(batches, copies, strict=True):
        assert list(batch) == list(copy) and all(torch.equal(batch[name], copy[name]) for name in copy)


def test_the_lists_of_names_are_not_changed(build, batches_for, quiet):
    names, excluded, layers = ["q_proj", "v_proj"], ["layers.1.self_attn.v_proj"], [0, 1]
    measure(
        build("llama"),
        batches_for("llama"),
        target_modules=names,
        exclude_modules=excluded,
        layers_to_transform=layers,
        **quiet,
    )
    assert (names, excluded, layers) == (["q_proj", "v_proj"], ["layers.1.self_attn.v_proj"], [0, 1])


def test_dropout_is_off_while_measuring(build, batches_for, quiet):
    model, batches = wrapped(build), batches_for("llama")
    spectra = measure(model.train(), batches, **quiet)
    expected = measure(build("llama").eval(), batches, **quiet)
    for name in expected:
        assert torch.equal(spectra[name].components, expected[name].components)


def test_a_peft_wrapper_makes_no_difference(build, batches_for, quiet):
    batches = batches_for("llama")
    expected = measure(build("llama"), batches, **quiet)
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():  # a trained adapter, which changes every activation
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    spectra = measure(model, batches, **quiet)
    assert list(spectra) == list(expected), "names of the base model"
    for name in expected:
        for part in ("components", "singular_values", "mean"):
            assert torch.equal(getattr(spectra[name], part), getattr(expected[name], part))


def test_merged_adapters_are_refused(build, batches_for, quiet):
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(EvaError, match=r"adapters are merged into 2 layers of the model; call unmerge_adapter"):
        measure(model, batches_for("llama"), **quiet)


@pytest.mark.on_hardware("torch does not compile for it")
@pytest.mark.parametrize("kind", ["torch.compile(model)", "by an own forward", "model.compile()", "layer.compile()"])
def test_after_compilation_and_a_forward_pass(build, batches_for, quiet, kind):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    batches = batches_for("llama", size=2)
    expected = measure(build("llama"), batches, **quiet)
    model = build("llama")
    if kind in ("torch.compile(model)", "by an own forward"):
        model = torch.compile(model, backend=backend)
    elif kind == "model.compile()":
        model.compile(backend=backend)
    else:
        model.model.layers[0].compile(backend=backend)
    with torch.no_grad():
        model(**batches[0])
    n_compiled = len(compiled)
    forward = (lambda model, batch: model(**batch)) if kind == "by an own forward" else None
    spectra = measure(model, batches, forward=forward, **quiet)
    assert list(spectra) == list(expected)
    for name in expected:
        assert spectra[name].n_rows == expected[name].n_rows
        torch.testing.assert_close(spectra[name].singular_values, expected[name].singular_values, rtol=1e-3, atol=1e-3)
    assert len(compiled) == n_compiled > 0, "neither the model nor our hooks are compiled anew"
    with torch.no_grad():
        model(**batches[0])
    torch._dynamo.reset()
