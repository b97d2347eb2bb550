"""Shared inputs by identity, repeated calls, experts, and what is left out behind the last target."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evatune import EvaError, EvaWarning, measure
from evatune.activations.absent import AbsentTensor

D = 12


class Net(nn.Module):
    """Linear layers called as `order` says: a list of (layer name, function from the input to what it gets)."""

    def __init__(self, names, run):
        super().__init__()
        for i, name in enumerate(names):
            torch.manual_seed(i)
            setattr(self, name, nn.Linear(D, D))
        self.run = run

    def forward(self, x):
        return self.run(self, x)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(30, D, generator=generator) @ torch.diag(torch.linspace(0.2, 3, D)) for _ in range(4)]


def check(names, run, batches, observe, quiet):
    model = Net(names, run)
    spectra = measure(model, batches, target_modules=list(names), **quiet)
    seen = observe(Net(names, run), batches, names, forward=lambda model, batch: model(batch))
    for name in names:
        seen.check(name, spectra[name])
    return spectra


def test_query_key_and_value_are_one_input(build, batches_for, quiet):
    spectra = measure(build("llama"), batches_for("llama"), **quiet)
    shared = {name.rsplit(".", 1)[-1]: target.input for name, target in spectra.targets.items() if ".1." in name}
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert shared == {
        "q_proj": attention + "q_proj",
        "k_proj": attention + "q_proj",
        "v_proj": attention + "q_proj",
        "o_proj": attention + "o_proj",
        "gate_proj": mlp + "gate_proj",
        "up_proj": mlp + "gate_proj",
        "down_proj": mlp + "down_proj",
    }
    assert len(spectra.inputs) == 8
    assert spectra[attention + "q_proj"] is spectra[attention + "v_proj"]


def test_equal_values_in_different_tensors_are_not_one_input(batches, observe, quiet):
    spectra = check("ab", lambda m, x: m.a(x) + m.b(x.clone()), batches, observe, quiet)
    assert [t.input for t in spectra.targets.values()] == ["a", "b"]


def test_a_tensor_changed_in_place_between_two_uses_is_two_inputs(batches, observe, quiet):
    def run(m, x):
        x = x.clone()
        y = m.a(x)
        x.mul_(2).add_(1)
        return y + m.b(x)

    spectra = check("ab", run, batches, observe, quiet)
    assert [t.input for t in spectra.targets.values()] == ["a", "b"]


@pytest.mark.on_hardware("its tensors have no inference mode")
def test_a_change_in_place_is_seen_under_inference_mode_too(batches, quiet):
    """Tensors made in inference mode do not count their changes."""

    def run(m, x):
        x = x.clone()
        y = m.a(x)
        x.mul_(2).add_(1)
        return y + m.b(x)

    with torch.inference_mode():
        spectra = measure(Net("ab", run), batches, target_modules=["a", "b"], **quiet)
    assert [t.input for t in spectra.targets.values()] == ["a", "b"]


def test_memory_that_is_used_again_is_another_input(batches, observe, quiet):
    """The first tensor is freed before the second is made, which mostly gets the same address."""

    def run(m, x):
        y = m.a(x * 2).sum()
        return y + m.b(x * 3).sum()

    spectra = check("ab", run, batches, observe, quiet)
    assert [t.input for t in spectra.targets.values()] == ["a", "b"]


def test_views_of_one_tensor_are_different_inputs(batches, observe, quiet):
    def run(m, x):
        wide = torch.cat([x, 3 * x.flip(1)], dim=1)
        return m.a(wide[:, :D]) + m.b(wide[:, D:])

    spectra = check("ab", run, batches, observe, quiet)
    assert [t.input for t in spectra.targets.values()] == ["a", "b"]


def test_a_layer_called_twice_in_a_pass_sees_both_inputs(batches, observe, quiet):
    spectra = check("ab", lambda m, x: m.b(m.a(torch.tanh(m.a(x)))), batches, observe, quiet)
    assert spectra["a"].n_rows == 2 * spectra["b"].n_rows == 240


def test_a_layer_called_twice_with_one_tensor_has_its_rows_twice_in_every_pass(batches, observe, quiet):
    check("ab", lambda m, x: m.b(m.a(x) + m.a(x)), batches, observe, quiet)


def test_targets_that_share_only_some_calls_are_measured_apart(batches, observe, quiet):
    """k gets q's tensor in one call and its own in another."""

    def run(m, x):
        return m.q(x) + m.k(x) + m.k(x.flip(1) * 2)

    spectra = check("qk", run, batches, observe, quiet)
    assert [t.input for t in spectra.targets.values()] == ["q", "k"]
    assert spectra["k"].n_rows == 2 * spectra["q"].n_rows


def test_targets_that_share_all_of_several_calls_are_measured_once(batches, observe, quiet):
    def run(m, x):
        y = x.flip(1) * 2
        return m.q(x) + m.k(x) + m.q(y) + m.k(y)

    spectra = check("qk", run, batches, observe, quiet)
    assert [t.input for t in spectra.targets.values()] == ["q", "q"]


def test_one_module_under_two_names_is_one_target(batches, quiet):
    model = Net("ab", lambda m, x: m.b(m.a(x)))
    model.b = model.a
    spectra = measure(model, batches, target_modules=["a", "b"], **quiet)
    assert list(spectra) == ["a"] and spectra["a"].n_rows == 240


def test_layers_called_another_number_of_times_later_are_measured_whole(batches, observe, quiet):
    """As experts are: what a pass calls depends on its batch, so it may not end by counting calls."""

    def run(m, x):
        y = m.a(x)
        if x[0, 0] > first:
            y = m.b(y) + m.b(torch.tanh(y))
        return m.c(torch.tanh(y))

    for first in (float(batches[0][0, 0]), float(batches[0][0, 0]) - 1e-3):  # b is called in the probe pass, or not
        batches = sorted(batches, key=lambda x: float(x[0, 0]), reverse=first < float(batches[0][0, 0]))
        model = Net("abc", run)
        seen = observe(Net("abc", run), batches, "abc", forward=lambda model, batch: model(batch))
        spectra = measure(model, batches, target_modules=list("abc"), **quiet)
        for name in "abc":
            seen.check(name, spectra[name])


def test_equal_memory_read_in_another_order_is_another_input(observe, quiet):
    squares = [torch.randn(D, D, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    spectra = check("ab", lambda m, x: m.a(x) + m.b(x.T), squares, observe, quiet)
    assert [t.input for t in spectra.targets.values()] == ["a", "b"]


def test_a_pass_that_goes_on_after_the_last_known_call_is_made_again(batches, observe, quiet):
    """The third pass begins as the first one did and goes on where that had ended."""
    times = {float(x[0, 0]): n for x, n in zip(batches, [1, 0, 2, 1], strict=True)}

    def run(m, x):
        n = times[float(x[0, 0])]
        y = torch.tanh(m.a(x))
        if n > 0:
            y = m.b(y)
        y = m.c(torch.tanh(y))
        return m.b(torch.tanh(y)) if n > 1 else y

    check("abc", run, batches, observe, quiet)


def test_targets_that_appear_late_and_share_do_not_drop_what_was_measured(batches, observe, quiet):
    count = [0]

    def run(m, x):
        count[0] += 1
        y = torch.tanh(m.a(x))
        return m.b(y) + m.c(y) + m.c(x) if count[0] > 1 else y

    seen = observe(Net("abc", run), batches, "abc", forward=lambda model, batch: model(batch))
    count[0] = 0
    spectra = measure(Net("abc", run), batches, target_modules=list("abc"), **quiet)
    for name in "abc":
        seen.check(name, spectra[name])


def test_targets_that_no_row_reaches_are_left_out_with_a_warning(batches, quiet):
    model = Net("abc", lambda m, x: m.a(x))
    with pytest.warns(EvaWarning, match="2 of 3 targets got no input in 4 batches .* the first is 'b'") as caught:
        spectra = measure(model, batches, target_modules=list("abc"), **quiet | {"tau": 0.99, "min_gain": 0.01})
    assert list(spectra) == ["a"] and len(caught) == 1


def test_inputs_given_by_name_are_seen(batches, observe, quiet):
    check("ab", lambda m, x: m.b(input=m.a(input=x)), batches, observe, quiet)


def count_calls(module):
    """Return a list that gets, for every call of a module, whether it had values to compute with."""
    calls = []
    module.register_forward_pre_hook(lambda module, args: calls.append(not isinstance(args[0], AbsentTensor)))
    return calls


@pytest.fixture
def unpadded(batches_for):
    return [{"input_ids": batch["input_ids"]} for batch in batches_for("llama", 5)]


def test_the_head_is_computed_in_the_first_pass_only(build, unpadded, quiet):
    model = build("llama")
    head, first = count_calls(model.lm_head), count_calls(model.model.layers[0].mlp)
    measure(model, unpadded, **quiet)
    assert (sum(first), sum(head), len(head)) == (5, 1, 5)


def test_nothing_is_computed_after_the_last_target(build, unpadded, quiet):
    model = build("llama")
    later = count_calls(model.model.layers[1])
    spectra = measure(model, unpadded, target_modules=["layers.0.self_attn.q_proj"], **quiet)
    assert (sum(later), len(later)) == (1, 5)
    assert spectra["model.layers.0.self_attn.q_proj"].n_batches == 5


def test_what_the_model_keeps_of_its_last_pass_has_no_part_in_the_next(batches, observe, quiet):
    """A value kept behind the last target would be without values in the next pass."""

    def run(m, x):
        state = getattr(m, "state", None)
        y = m.a(x if state is None or state.shape != x.shape else x + state)
        m.state = torch.tanh(y)
        return y

    check("a", run, batches, observe, quiet)


@pytest.mark.parametrize("ask", [lambda y: float(y.sum()), lambda y: y.data_ptr()], ids=["a value", "an address"])
def test_a_model_that_asks_for_a_value_behind_the_last_target_is_computed_whole(batches, observe, quiet, ask):
    """A kernel that is no operation of torch asks for the address of its inputs."""
    whole = []

    def run(m, x):
        y = m.b(torch.tanh(m.a(x)))
        whole.append(ask(y))
        return y

    check("ab", run, batches, observe, quiet)
    assert len(whole) == 4 + 4  # plain hooks, and each pass that was measured


def test_what_is_changed_in_place_behind_the_last_target_stays_as_it_is(batches, quiet):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(D, D)
            self.register_buffer("kept", torch.zeros(D))

        def forward(self, x):
            self.kept.mul_(0).add_(self.a(x).mean(0).detach())
            return self.kept

    model = Counting()
    measure(model, batches, target_modules=["a"], **quiet)
    assert not isinstance(model.kept, AbsentTensor) and model.kept.isfinite().all()


def test_a_head_that_is_a_target_is_measured(build, batches_for, observe, quiet):
    model, batches = build("llama"), batches_for("llama", 4)
    spectra = measure(model, batches, target_modules=["lm_head", "q_proj"], **quiet)
    assert spectra["lm_head"].n_batches == 4
    seen = observe(model, batches, spectra, select=lambda name, batch: batch["attention_mask"])
    seen.check("lm_head", spectra["lm_head"])


def test_no_loss_is_computed(build, batches_for, quiet, monkeypatch):
    model = build("llama")

    def refuse(*args, **kwargs):
        raise AssertionError("a loss was computed")

    monkeypatch.setattr(type(model), "loss_function", refuse, raising=False)
    measure(model, batches_for("llama"), **quiet)


@pytest.mark.on_cpu("an accelerator would have to wait; there, a check reports such rows")
def test_a_nan_activation_names_the_target_and_the_batch(build, batches_for, quiet):
    model, batches = build("llama"), batches_for("llama")
    embedded = [{"inputs_embeds": model.model.embed_tokens(batch["input_ids"]).detach()} for batch in batches]
    embedded[1]["inputs_embeds"][2, 3] = float("nan")
    with pytest.raises(
        EvaError, match=r"input of 'model\.layers\.0\.self_attn\.q_proj' in batch 2: \d+ of 72 rows hold NaN"
    ):
        measure(model, embedded, **quiet)


def test_a_target_that_gets_no_matrix_of_its_width_says_so(quiet):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.fc.forward = lambda x: x

        def forward(self, x):
            return self.fc(x)

    with pytest.raises(EvaError, match=r"target 'fc' takes 4 features, but its input is \(3, 5\)"):
        measure(Odd(), [torch.zeros(3, 5)], target_modules=["fc"], **quiet)
