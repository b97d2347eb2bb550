"""Tensors without values: shapes as with values, and an error wherever a value is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evatune.activations.absent import AbsentTensor

REAL = torch.randn(2, 3, 8)
WEIGHT = torch.randn(5, 8)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: F.linear(x, WEIGHT),
        lambda x: REAL + x,
        lambda x: torch.cat([x, REAL], dim=1).transpose(0, 1)[1:],
        lambda x: F.scaled_dot_product_attention(x[None], x[None], REAL[None]),
        lambda x: x.to(torch.bfloat16).softmax(-1).float().mean(dim=(1, 2)),
        lambda x: x.new_zeros(4, device=x.device) + torch.arange(4),
        lambda x: torch.stack(x.unbind(1)).masked_fill_(torch.ones(3, 2, 1) > 0, 1.0),
        lambda x: nn.LayerNorm(8)(x).reshape(-1, 4).split(3)[0],
    ],
)
def test_shapes_dtypes_and_strides_are_those_of_the_operation(run):
    with torch.no_grad():
        absent, real = run(AbsentTensor(REAL)), run(REAL)
    assert type(absent) is AbsentTensor
    assert (absent.shape, absent.stride(), absent.dtype, absent.device) == (
        real.shape,
        real.stride(),
        real.dtype,
        real.device,
    )


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, REAL),
        lambda x: int(x.argmax()),
        lambda x: [1 for _ in range(10) if x.norm() > 3],
        lambda x: REAL.clone().add_(x),
        lambda x: torch.zeros(2, 3, 8).copy_(x),
        lambda x: x.data_ptr(),
        lambda x: (2 * x).transpose(0, 1).data_ptr(),
    ],
)
def test_whatever_asks_for_a_value_is_an_error(ask):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        ask(AbsentTensor(REAL))


def test_it_shows_its_shape():
    assert repr(AbsentTensor(REAL)) == f"AbsentTensor(shape=(2, 3, 8), dtype=torch.float32, device='{REAL.device}')"
