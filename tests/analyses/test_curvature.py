from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from evatune.analyses.curvature import curvature, lanczos
from evatune.errors import EvaError


class Adapted(nn.Module):
    """A layer with a frozen weight and B A beside it, where B = 0, under a nonlinear head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.zeros(4, 2))
        self.head = nn.Parameter(torch.randn(3, 4))

    def forward(self, batch):
        return functional.tanh(batch @ (self.weight + self.b @ self.a).T) @ self.head.T


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    model = Adapted().double()
    batches = [(torch.randn(n, 5).double(), torch.randint(0, 3, (n,))) for n in (8, 3)]
    return model, batches


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def exact_hessian(model, batches, scales):
    """Return the Hessian of the mean loss, each parameter measured in its unit."""
    parameters = {name: model.get_parameter(name).detach() for name in scales}
    sizes = [parameter.numel() for parameter in parameters.values()]

    def mean_loss(vector_n):
        parts = zip(parameters.items(), vector_n.split(sizes), scales.values(), strict=True)
        moved = {name: parameter + unit * part.view_as(parameter) for (name, parameter), part, unit in parts}
        return sum(functional.cross_entropy(functional_call(model, moved, (x,)), y) for x, y in batches) / len(batches)

    return torch.autograd.functional.hessian(mean_loss, torch.zeros(sum(sizes), dtype=torch.float64))


@pytest.mark.parametrize("scales", [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 16.0}, {"b": 0.5}, {"head": 1.0}])
def test_both_ends_are_those_of_the_exact_hessian(adapted, scales):
    model, batches = adapted
    values = torch.linalg.eigvalsh(exact_hessian(model, batches, scales))
    found = curvature(model, batches, loss, scales=scales, n_products=18)
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-8)
    assert found.smallest == pytest.approx(float(values[0]), rel=1e-8, abs=1e-12)
    assert found.sharpness == pytest.approx(float(values.abs().max()), rel=1e-8)
    assert found.residual < 1e-6


def test_few_products_are_within_the_stated_distance(adapted):
    model, batches = adapted
    scales = {"a": 1.0, "b": 1.0}
    values = torch.linalg.eigvalsh(exact_hessian(model, batches, scales))
    for n_products in (1, 3, 6):
        found = curvature(model, batches, loss, scales=scales, n_products=n_products)
        sharpest = max(found.largest, found.smallest, key=abs)
        assert float((values - sharpest).abs().min()) <= found.residual
        assert float(values[0]) - 1e-12 <= found.smallest <= found.largest <= float(values[-1]) + 1e-12
    assert found.residual < 0.1 * found.sharpness


def test_without_b_a_start_at_zero_has_no_curvature_of_its_own(adapted):
    model, batches = adapted
    found = curvature(model, batches, loss, scales={"a": 1.0})
    assert (found.largest, found.smallest, found.residual) == (0, 0, 0)


def test_with_a_small_a_the_gradient_of_the_weight_makes_both_ends(adapted):
    model, batches = adapted
    with torch.no_grad():
        model.a *= 1e-6
    model.weight.requires_grad_(True)
    losses = torch.stack([loss(model, batch) for batch in batches])
    expected = float(torch.linalg.matrix_norm(torch.autograd.grad(losses.mean(), model.weight)[0], 2))
    found = curvature(model, batches, loss, scales={"a": 1.0, "b": 1.0}, n_products=18)
    assert (found.largest, found.smallest) == pytest.approx((expected, -expected), rel=1e-4)


def test_a_linear_loss_has_no_curvature(adapted):
    model, batches = adapted
    model.a.requires_grad_(False), model.b.requires_grad_(False)
    found = curvature(model, batches, lambda model, batch: model(batch[0]).sum(), scales={"head": 1.0})
    assert found.sharpness == 0


def test_a_parameter_that_the_loss_does_not_see_adds_nothing(adapted):
    model, _ = adapted
    one = torch.tensor([[1.0, 0, 0, 0, 0]]).double()
    found = curvature(model, [one], lambda model, x: 3 * (model.a @ x.T).square().sum(), scales={"head": 1.0, "a": 1.0})
    assert found.largest == pytest.approx(6.0)


def test_the_magnitude_counts_and_not_the_sign():
    values = torch.tensor([-9.0, -1, 0, 2, 8], dtype=torch.float64)
    found, residuals = lanczos(lambda vector: values * vector, torch.ones(5).double(), n_products=5)
    assert torch.allclose(found, values)
    assert (residuals < 1e-12).all()
    found, _ = lanczos(lambda vector: values * vector, torch.tensor([1.0, 0, 0, 0, 1]).double(), n_products=5)
    assert torch.allclose(found, values[[0, 4]])  # no product more than the first direction has eigenvectors in it


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 12)

    def forward(self, batch):
        query, key, value = self.map(batch).view(2, 3, 1, 12).transpose(1, 2).chunk(3, dim=-1)
        return functional.scaled_dot_product_attention(query, key, value).mean((1, 2))


def test_attention_has_a_second_derivative_here(adapted):
    torch.manual_seed(0)
    model, batches = Attending(), [(torch.randn(2, 3, 4), torch.tensor([0, 1]))]
    found = curvature(model, batches, loss, scales={"map.weight": 1.0}, n_products=20)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        values = torch.linalg.eigvalsh(
            exact_hessian(model.double(), [(batches[0][0].double(), batches[0][1])], {"map.weight": 1.0})
        )
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-4)


def test_the_model_and_the_random_numbers_stay_as_they_were(adapted):
    model, batches = adapted
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    curvature(model, batches, loss, scales={"b": 1.0})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_wrong_is_named(adapted):
    model, batches = adapted
    for scales, message in (
        ({"c": 1.0}, "the model has no parameter 'c'"),
        ({"weight": 1.0}, "parameter 'weight' is frozen"),
        ({}, "no parameter is named"),
    ):
        with pytest.raises(EvaError, match=message):
            curvature(model, batches, loss, scales=scales)
    with pytest.raises(EvaError, match="needs one batch at least"):
        curvature(model, [], loss, scales={"b": 1.0})
    with pytest.raises(EvaError, match="n_products is 0, but must be at least 1"):
        curvature(model, batches, loss, scales={"b": 1.0}, n_products=0)
    with pytest.raises(EvaError, match="the loss of batch 2 is nan"):
        curvature(model, [batches[0], (batches[1][0] * float("nan"), batches[1][1])], loss, scales={"b": 1.0})
    with pytest.raises(EvaError, match="product 1 with the Hessian is not finite"):
        curvature(model, batches, lambda model, batch: model.b.square().sum().sqrt() * 0, scales={"b": 1.0})
