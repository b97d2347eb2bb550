from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from evatune.analyses.movement import distances, read_a, read_factors, update_cosines
from evatune.errors import EvaError


def write(folder, **factors):
    folder.mkdir()
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": matrix.contiguous()
        for name, pair in factors.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator)


def test_movement_is_what_numpy_says(tmp_path, pair):
    a, b = pair
    step = torch.zeros_like(a)
    step[1, 2] = 2.0
    before, after = write(tmp_path / "before", q=(a, 0 * b)), write(tmp_path / "after", q=(a + step, b))
    found = distances(read_a(before), read_a(after, initial=before))["q"]
    assert found.spectral_norm == pytest.approx(2.0, rel=1e-6)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(a.flatten(), (a + step).flatten(), dim=0)))


def test_a_converted_adapter_is_compared_by_its_trained_half(tmp_path, pair):
    a, b = pair
    before = write(tmp_path / "before", q=(a, b))
    after = write(tmp_path / "after", q=(torch.cat([a, a]), torch.cat([b, -b], dim=1)))
    assert distances(read_a(before), read_a(after, initial=before))["q"].cosine == pytest.approx(1.0)


def test_only_matrices_of_one_shape_are_compared(tmp_path, pair):
    """Of rank 4 beside rank 8, the larger one is no converted adapter: it has that rank from the start."""
    a, b = pair
    small = write(tmp_path / "small", q=(a, b), k=(a.clone(), b.clone()))
    large = write(tmp_path / "large", q=(torch.cat([a, a]), torch.cat([b, b], dim=1)), k=(-a, b))
    assert distances(read_a(small), read_a(large, initial=large)).keys() == {"k"}


def test_cosines_of_updates_do_not_depend_on_how_they_are_factorized(tmp_path, pair):
    a, b = pair
    other = write(tmp_path / "other", q=(-2 * a, b / 2))
    values = update_cosines({"one": write(tmp_path / "one", q=(a, b)), "other": other})
    assert values[0, 1] == pytest.approx(-1.0)
    product = (b @ a).flatten()
    third = torch.randn(3, 7, generator=torch.Generator().manual_seed(5))
    values = update_cosines({"one": tmp_path / "one", "third": write(tmp_path / "third", q=(third, b))})
    expected = torch.cosine_similarity(product, (b @ third).flatten(), dim=0)
    assert values[0, 1] == pytest.approx(float(expected), rel=1e-5)


def test_folders_without_lora_are_told(tmp_path, pair):
    with pytest.raises(EvaError, match=r"holds no adapter: it has no adapter_model\.safetensors"):
        read_factors(tmp_path)
    write(tmp_path / "a", q=pair)
    write(tmp_path / "b", k=pair)
    with pytest.raises(EvaError, match="have no target of the same shape in common"):
        distances(read_a(tmp_path / "a"), read_a(tmp_path / "b"))
    with pytest.raises(EvaError, match="the adapters of one, two have no target in common"):
        update_cosines({"one": tmp_path / "a", "two": tmp_path / "b"})
