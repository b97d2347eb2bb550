from __future__ import annotations

import pytest
import torch

from evatune.errors import EvaError
from evatune.initialization import lora_one


@pytest.fixture
def gradient() -> torch.Tensor:
    return torch.randn(10, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("scaling", "step"), [(1.0, 0.1), (0.25, 0.5)])
def test_the_product_is_the_best_step_of_its_rank_down_the_gradient(gradient, scaling, step):
    A, B = lora_one(gradient, 4, scaling=scaling, step=step)
    U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
    torch.testing.assert_close(scaling * B @ A, -step / S[0] * (U[:, :4] * S[:4] @ Vh[:4]))
    assert torch.linalg.matrix_norm(scaling * B @ A, 2) == pytest.approx(step)


def test_the_step_lowers_the_loss_of_a_linear_problem(gradient):
    # L(W) = <G, W> falls by step * ||G_r||_F^2 / s_1.
    A, B = lora_one(gradient, 4, step=0.01)
    S = torch.linalg.svdvals(gradient)
    assert (gradient * (B @ A)).sum() == pytest.approx(-0.01 * float(S[:4].square().sum() / S[0]))


def test_the_size_of_the_gradient_does_not_matter(gradient):
    small, large = lora_one(1e-6 * gradient, 4), lora_one(1e6 * gradient, 4)
    torch.testing.assert_close(small[1] @ small[0], large[1] @ large[0])


def test_no_gradient_gives_no_step():
    A, B = lora_one(torch.zeros(5, 7), 2)
    assert not B.any()
    torch.testing.assert_close(A @ A.T, torch.eye(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 11}, "rank 11 is out of range"), ({"step": 0.0}, "step must be a positive number")],
)
def test_values_out_of_range_are_refused(gradient, options, message):
    with pytest.raises(EvaError, match=message):
        lora_one(gradient, **({"rank": 2} | options))
