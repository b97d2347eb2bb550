"""Theorem 3.2: the leading uncentred components maximize the expected squared gradient of B at B = 0.

Its assumptions: input x and output gradient g are uncorrelated in their second moments. Here every x meets every g, so
they hold exactly, and gradients come from autograd through an adapter.
"""

from __future__ import annotations

import torch

from evatune.initialization import eva
from evatune.pca import StreamingPCA

N, D, OUT, R = 40, 12, 7, 4


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, D, dtype=torch.float64)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64) @ mixing.T
    # A large mean in a direction of little variance: centred and uncentred components differ.
    x = x + 3 * torch.linalg.svd(mixing)[0][:, -1]
    return x, torch.randn(N // 4, OUT, generator=generator, dtype=torch.float64)


def expected_squared_gradient(A: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> float:
    """Return the mean over all pairs of ‖∂L/∂B‖² for L = g·(B A x)."""
    total = 0.0
    for row in x:
        B = torch.zeros(OUT, len(A), dtype=torch.float64, requires_grad=True)
        for gradient in g:
            total += float(torch.autograd.grad(gradient @ (B @ (A @ row)), B)[0].square().sum())
    return total / (len(x) * len(g))


def components(x: torch.Tensor, *, center: bool) -> torch.Tensor:
    pca = StreamingPCA(R, backend="exact", center=center)
    for rows in x.split(16):
        pca.partial_fit(rows)
    return eva(pca.components_.double(), R)


def test_no_other_orthonormal_rows_have_a_larger_expected_gradient():
    x, g = problem()
    best = expected_squared_gradient(components(x, center=False), x, g)
    # The theorem's maximum itself: E‖g‖² times the sum of the leading eigenvalues of E[x xᵀ].
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / N).flip(0)
    assert abs(best - float(g.square().sum(1).mean() * eigenvalues[:R].sum())) < 1e-5 * best
    for seed in range(10):
        noise = torch.randn(D, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert expected_squared_gradient(torch.linalg.qr(noise)[0].T, x, g) < best
    # Small turns away from the optimum lose too, so it is a maximum and not only better than chance.
    top = torch.linalg.qr(x.T @ x)[0]
    for seed in range(5):
        noise = torch.randn(R, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        turned = torch.linalg.qr((components(x, center=False) + 0.05 * noise @ top).T)[0].T
        assert expected_squared_gradient(turned, x, g) < best


def test_it_is_about_uncentred_components():
    x, g = problem()
    centred = expected_squared_gradient(components(x, center=True), x, g)
    assert centred < 0.95 * expected_squared_gradient(components(x, center=False), x, g)
