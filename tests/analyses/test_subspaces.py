from __future__ import annotations

import pytest
import torch

from evatune.analyses.subspaces import overlap


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles():
    basis = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)))[0].T
    turned = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0] @ basis[:4]
    assert overlap(basis[:4], turned) == pytest.approx(1.0)  # the span counts, not its basis
    assert overlap(basis[:4], basis[4:8]) == pytest.approx(0.0, abs=1e-10)
    assert overlap(basis[:4], basis[2:6]) == pytest.approx(0.5)
    angle = 0.3
    line = torch.cos(torch.tensor(angle)) * basis[:1] + torch.sin(torch.tensor(angle)) * basis[1:2]
    assert overlap(basis[:1], line) == pytest.approx(float(torch.cos(torch.tensor(angle)) ** 2), abs=1e-6)
