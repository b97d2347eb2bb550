"""Each method against its definition, computed anew in float64 on a small model."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import evatune
from evatune.activations.gradients import output_gradient_energy, weight_gradients
from evatune.activations.layers.targets import TargetRules, find_targets
from evatune.adapters import initialized_plan

RANK, ALPHA = 3, 1.5
SCALE = ALPHA / RANK
QUIET = {"progress": False}


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 10)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> SimpleNamespace:
        out = self.down(torch.tanh(self.up(x)))
        return SimpleNamespace(out=out, loss=None if labels is None else (out - labels).square().mean())


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    spread = torch.logspace(0, -1.5, 12)
    return [
        {"x": torch.randn(30, 12, generator=generator) * spread, "labels": torch.randn(30, 10, generator=generator)}
        for _ in range(3)
    ]


def prepare(model: nn.Module, method: str, **options: object) -> nn.Module:
    return evatune.prepare(model, method=method, rank=RANK, lora_alpha=ALPHA, target_modules=["up", "down"], **options)


def parts(model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A, B and the base weight of a layer in float64."""
    layer = model.get_base_model().get_submodule(name)
    modules = (layer.lora_A["default"], layer.lora_B["default"], layer.get_base_layer())
    return tuple(module.weight.detach().double() for module in modules)


def inputs(model: Toy, batches: list[dict[str, torch.Tensor]], name: str) -> list[torch.Tensor]:
    """Return the inputs of a layer in float64, one tensor a batch."""
    wide = copy.deepcopy(model).double()
    return [
        batch["x"].double() if name == "up" else torch.tanh(wide.up(batch["x"].double())).detach() for batch in batches
    ]


def gradient(model: Toy, batches: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    wide = copy.deepcopy(model).double()
    loss = sum(wide(batch["x"].double(), batch["labels"].double()).loss for batch in batches) / len(batches)
    return torch.autograd.grad(loss, wide.get_submodule(name).weight)[0]


def close(actual: torch.Tensor, expected: torch.Tensor, *, atol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=1e-4)


def projection(rows: torch.Tensor) -> torch.Tensor:
    Q = torch.linalg.qr(rows.T)[0]
    return Q @ Q.T


@pytest.mark.parametrize("name", ["up", "down"])
def test_pissa_trains_the_principal_components_and_freezes_the_rest(toy, name):
    W = toy.get_submodule(name).weight.detach().double().clone()
    A, B, base = parts(prepare(toy, "pissa"), name)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    close(base + SCALE * B @ A, W)
    close(SCALE * B @ A, U[:, :RANK] * S[:RANK] @ Vh[:RANK])
    close(A @ A.T, torch.diag(S[:RANK] / SCALE))  # both sides take the root
    close(B.T @ B, torch.diag(S[:RANK] / SCALE))


@pytest.mark.parametrize("name", ["up", "down"])
def test_milora_trains_the_minor_components_and_freezes_the_principal_ones(toy, name):
    W = toy.get_submodule(name).weight.detach().double().clone()
    A, B, base = parts(prepare(toy, "milora"), name)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    close(base + SCALE * B @ A, W)
    close(base, U[:, :-RANK] * S[:-RANK] @ Vh[:-RANK])


@pytest.mark.parametrize("name", ["up", "down"])
def test_olora_has_an_orthonormal_b_and_a_from_the_qr_decomposition(toy, name):
    W = toy.get_submodule(name).weight.detach().double().clone()
    A, B, base = parts(prepare(toy, "olora"), name)
    Q, R = torch.linalg.qr(W)
    close(B.T @ B, torch.eye(RANK))
    close(B @ A, Q[:, :RANK] @ R[:RANK])
    close(A.tril(-1), torch.zeros_like(A))
    close(base + SCALE * B @ A, W)


@pytest.mark.parametrize("name", ["up", "down"])
def test_corda_takes_the_principal_part_as_the_input_s_covariance_weighs_it(toy, batches, name):
    W = toy.get_submodule(name).weight.detach().double().clone()
    # PEFT divides what it gets in one pass by its largest entry.
    samples = [rows / rows.max() for rows in inputs(toy, batches, name)]
    C = sum(rows.T @ rows for rows in samples) / len(samples)
    C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
    A, B, base = parts(prepare(toy, "corda", batches=batches), name)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    close(SCALE * B @ A, U[:, :RANK] * S[:RANK] @ Vh[:RANK] @ torch.linalg.inv(C), atol=1e-3)
    close(base + SCALE * B @ A, W)
    # No other part of rank r leaves less behind where the input lies; PiSSA's leaves less in the plain norm.
    left = torch.linalg.matrix_norm(base @ C)
    assert left == pytest.approx(float(S[RANK:].square().sum().sqrt()), rel=1e-3)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert left < torch.linalg.matrix_norm((U[:, RANK:] * S[RANK:] @ Vh[RANK:]) @ C)


@pytest.mark.parametrize("name", ["up", "down"])
def test_lora_ga_aligns_a_and_b_with_the_gradient(toy, batches, name):
    W = toy.get_submodule(name).weight.detach().double().clone()
    G = gradient(toy, batches, name)
    A, B, base = parts(prepare(toy, "lora-ga", batches=batches), name)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    close(projection(A), Vh[:RANK].T @ Vh[:RANK], atol=1e-3)
    second = U[:, RANK : 2 * RANK]
    close(projection(B.T), second @ second.T, atol=1e-3)
    close(base + SCALE * B @ A, W)


@pytest.mark.parametrize("name", ["up", "down"])
def test_lora_one_is_a_step_down_the_gradient_beside_the_untouched_base(toy, batches, name):
    W = toy.get_submodule(name).weight.detach().double().clone()
    G = gradient(toy, batches, name)
    before = sum(float(toy(**batch).loss) for batch in batches)
    model = prepare(toy, "lora-one", batches=batches)
    A, B, base = parts(model, name)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    close(SCALE * B @ A, -(U[:, :RANK] * S[:RANK] @ Vh[:RANK]) / (128 * S[0]))
    assert torch.equal(base, W)
    assert sum(float(model(**batch).loss) for batch in batches) < before


def pca(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _, S, Vh = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    return Vh, S.square() / (len(rows) - 1)


MEASURED = {**QUIET, "backend": "exact", "tau": None, "min_gain": None}


@pytest.mark.parametrize("name", ["up", "down"])
def test_eva_rows_are_the_principal_components_and_b_is_zero(toy, batches, name):
    rows = torch.cat(inputs(toy, batches, name))
    model = prepare(toy, "eva", batches=batches, rho=1.0, **MEASURED)
    A, B, _ = parts(model, name)
    Vh = pca(rows)[0]
    close((A * Vh[:RANK]).sum(dim=1).abs(), torch.ones(RANK), atol=1e-4)
    assert not B.any()


@pytest.mark.parametrize("name", ["up", "down"])
def test_eva_minor_rows_are_the_last_principal_components_at_uniform_ranks(toy, batches, name):
    rows = torch.cat(inputs(toy, batches, name))
    model = prepare(toy, "eva-minor", batches=batches, **QUIET)
    A, B, _ = parts(model, name)
    Vh = pca(rows)[0]
    close((A * Vh.flip(0)[:RANK]).sum(dim=1).abs(), torch.ones(RANK), atol=1e-2)
    assert not B.any()
    uneven = {"rho": 2.0, "metric": "raw", "max_batches": 3}  # by which EVA itself redistributes
    large = [{**batch, "x": 100 * batch["x"]} for batch in batches]
    model = prepare(Toy(), "eva-minor", batches=large, **uneven, **QUIET)
    assert set(initialized_plan(model).ranks.values()) == {RANK}
    assert set(initialized_plan(prepare(Toy(), "eva", batches=large, **uneven, **QUIET)).ranks.values()) != {RANK}


def test_eva_minor_refuses_spectra_without_the_minor_components(toy, batches):
    spectra = evatune.measure(toy, batches, rank=RANK, target_modules=["up", "down"], **QUIET)
    with pytest.raises(evatune.EvaError, match="EVA-minor needs all 12 components of 12 features, got the first 6"):
        prepare(toy, "eva-minor", spectra=spectra)


@pytest.fixture
def spectra(toy, batches):
    return evatune.measure(toy, batches, rank=RANK, target_modules=["up", "down"], **MEASURED)


def down_rows(model: nn.Module) -> dict[str, torch.Tensor]:
    plan = initialized_plan(model)
    return {name: parts(model, name)[0] for name, rank in plan.ranks.items() if rank}


def test_ablations_differ_from_eva_in_what_they_say(toy, spectra):
    eva = prepare(copy.deepcopy(toy), "eva", spectra=spectra)
    plan, rows = initialized_plan(eva), down_rows(eva)
    for method in ("eva-rot", "eva-perm", "eva-shuffle", "lora-redist", "eva-whiten"):
        other = prepare(copy.deepcopy(toy), method, spectra=spectra)
        assert initialized_plan(other) == plan
        for name, A in down_rows(other).items():
            scale = (torch.linalg.matrix_norm(A) / torch.linalg.matrix_norm(rows[name])).item()
            if method == "eva-rot":
                close(A.T @ A, rows[name].T @ rows[name])
            elif method == "eva-perm":
                assert sorted(map(tuple, A.tolist())) == sorted(map(tuple, rows[name].tolist()))
            elif method == "eva-shuffle":
                assert scale == pytest.approx(1, abs=1e-6)
                assert not torch.allclose(A.norm(dim=1), torch.ones(len(A), dtype=torch.float64), atol=1e-3)
            elif method == "lora-redist":
                assert A.abs().max() <= A.shape[1] ** -0.5
                assert not torch.allclose(projection(A), projection(rows[name]), atol=0.1)
            else:
                roots = spectra[name].singular_values[: len(A)].double().sqrt()
                close(A * roots[:, None], rows[name])
    for method, metric in (("eva-raw", "raw"), ("eva-max", "max")):
        model = prepare(copy.deepcopy(toy), method, spectra=spectra)
        assert initialized_plan(model).ranks == spectra.plan(RANK, metric=metric).ranks


def test_gradients_are_those_of_autograd(toy, batches):
    targets = find_targets(toy, TargetRules(target_modules=["up", "down"]))
    found = weight_gradients(toy, iter(batches), targets=targets)
    energy = output_gradient_energy(toy, iter(batches), targets=targets)
    for name in ("up", "down"):
        close(found[name], gradient(toy, batches, name))
    squares: dict[str, list[torch.Tensor]] = {"up": [], "down": []}
    wide = copy.deepcopy(toy).double()
    for batch in batches:
        hidden = wide.up(batch["x"].double())
        out = wide.down(torch.tanh(hidden))
        grads = torch.autograd.grad((out - batch["labels"].double()).square().mean(), [hidden, out])
        for name, grad in zip(("up", "down"), grads, strict=True):
            squares[name].append(grad.square().sum(dim=1))
    for name in ("up", "down"):
        assert energy[name] == pytest.approx(float(torch.cat(squares[name]).mean()), rel=1e-5)
    one = weight_gradients(toy, batches, targets=targets, n_batches=1)
    close(one["up"], gradient(toy, batches[:1], "up"))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in toy.parameters())
    assert not any(module._forward_hooks for module in toy.modules())


def test_eva_grad_gives_ranks_to_variance_times_gradient_energy(toy, batches):
    with torch.no_grad():
        toy.down.weight.mul_(0.01)  # little gradient reaches `up`
    targets = find_targets(toy, TargetRules(target_modules=["up", "down"]))
    energy = output_gradient_energy(toy, batches, targets=targets)
    model = prepare(copy.deepcopy(toy), "eva-grad", batches=iter(batches), **MEASURED)
    scores = {name: pca(torch.cat(inputs(toy, batches, name)))[1][:6] * energy[name] for name in ("up", "down")}
    threshold = torch.cat(list(scores.values())).sort(descending=True).values[2 * RANK - 1]
    expected = {name: int((values >= threshold).sum()) for name, values in scores.items()}
    assert initialized_plan(model).ranks == expected
    by_variance = initialized_plan(prepare(copy.deepcopy(toy), "eva-raw", batches=batches, **MEASURED)).ranks
    assert expected["up"] < by_variance["up"]
    for _name, A in down_rows(model).items():
        close(A @ A.T, torch.eye(len(A)), atol=1e-5)


def test_eva_grad_looks_at_all_batches_for_the_variance_and_at_few_for_the_gradient(toy, batches):
    seen = []

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(batch)
        return model(**batch).loss

    few = prepare(copy.deepcopy(toy), "eva-grad", batches=iter(batches), gradient_batches=1, loss=loss, **MEASURED)
    assert len(seen) == 1
    spectra = evatune.measure(toy, batches, rank=RANK, target_modules=["up", "down"], metric="raw", **MEASURED)
    for name, A in down_rows(few).items():
        close(A, spectra[name].components[: len(A)])


def test_the_first_gradient_of_eva_exceeds_that_of_lora_at_equal_scale(toy, batches):
    norms = {}
    for method in ("eva", "lora"):
        options = {"batches": batches, "rho": 1.0, **MEASURED} if method == "eva" else {}
        model = prepare(copy.deepcopy(toy), method, **options)
        for batch in batches:
            model(**batch).loss.backward()
        norms[method] = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert norms["eva"] > norms["lora"]


def test_adalora_starts_above_its_target(toy):
    config = prepare(toy, "adalora", total_steps=40).peft_config["default"]
    assert (config.init_r, config.target_r, config.tinit, config.tfinal, config.total_step) == (7, 3, 4, 10, 40)
