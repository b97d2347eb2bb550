from __future__ import annotations

import pytest
import torch
from tests.fake_device import fake_device
from torch import nn

from evatune.analyses.kernel import alignment, gradient_kernels
from evatune.errors import EvaError


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    return model, [torch.randn(1, 6, dtype=torch.float64) for _ in range(8)]


def loss(model, example):
    return model(example).sum()


def test_the_kernel_is_that_of_the_gradients(small):
    model, examples = small
    identity = {"0": torch.eye(6, dtype=torch.float64), "2": torch.eye(5, dtype=torch.float64)}
    found = gradient_kernels(model, examples, loss, starts={"all": identity})
    rows = []
    for example in examples:
        model.zero_grad()
        loss(model, example).backward()
        rows.append(torch.cat([model[0].weight.grad.flatten(), model[2].weight.grad.flatten()]))
    expected = torch.stack(rows) @ torch.stack(rows).T
    assert torch.allclose(found["full"], expected)
    assert torch.allclose(found["all"], expected)  # an A of full rank keeps everything


def test_the_kernel_of_a_start_is_that_of_training_b(small):
    model, examples = small
    a = torch.randn(2, 6, dtype=torch.float64)
    found = gradient_kernels(model, examples, loss, starts={"a": {"0": a}})["a"]
    b = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    rows = []
    for example in examples:
        hidden = model[0](example) + example @ a.T @ b.T
        rows.append(torch.autograd.grad(model[2](model[1](hidden)).sum(), b)[0].flatten())
    assert torch.allclose(found, torch.stack(rows) @ torch.stack(rows).T)


@pytest.mark.on_cpu("it brings a device of its own")
def test_kernels_of_a_model_on_another_device_are_on_the_cpu(small):
    model, examples = small
    starts = {"a": {"0": torch.randn(2, 6, dtype=torch.float64)}}
    expected = gradient_kernels(model, examples, loss, starts=starts)
    with fake_device() as device:
        moved = [example.to(device) for example in examples]
        found = gradient_kernels(model.to(device), moved, loss, starts=starts)
    for name in ("full", "a"):
        assert found[name].device.type == "cpu" and torch.allclose(found[name], expected[name])


def test_what_was_frozen_stays_frozen_also_after_an_error(small):
    model, examples = small
    model.requires_grad_(False)
    starts = {"a": {"0": torch.eye(6, dtype=torch.float64)}}
    gradient_kernels(model, examples, loss, starts=starts)
    with pytest.raises(EvaError, match="needs one example at least"):
        gradient_kernels(model, [], loss, starts=starts)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(EvaError, match="1 is no module with a weight matrix"):
        gradient_kernels(model, examples, loss, starts={"a": {"1": torch.eye(6)}})


def test_alignment_is_one_for_the_same_leading_eigenvectors():
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    first = basis @ torch.diag(torch.tensor([9.0, 8, 1, 1, 1, 1], dtype=torch.float64)) @ basis.T
    second = basis @ torch.diag(torch.tensor([5.0, 7, 2, 1, 1, 1], dtype=torch.float64)) @ basis.T
    third = basis @ torch.diag(torch.tensor([1.0, 1, 1, 1, 8, 9], dtype=torch.float64)) @ basis.T
    assert alignment(first, second, n_leading=2) == pytest.approx(1.0)
    assert alignment(first, third, n_leading=2) == pytest.approx(0.0, abs=1e-12)
