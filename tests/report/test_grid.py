from __future__ import annotations

import doctest

import numpy as np
import pytest

from evatune.report import grid as module
from evatune.report.grid import OUTSIDE, grid, locate


def layers(stack: str, n: int, *matrices: str) -> list[str]:
    return [f"{stack}.{index}.{matrix}" for index in range(n) for matrix in matrices]


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("name", "row", "column", "stack"),
    [
        ("model.layers.12.mlp.down_proj", "12", "down_proj", "model.layers"),
        ("transformer.h.3.attn.c_attn", "3", "c_attn", "transformer.h"),
        ("encoder.layer.2.attention.self.query", "2", "query", "encoder.layer"),
        ("model.layers.5.mlp.experts.7.w1", "5", "w1", "model.layers"),
        ("net.0", "0", "net", "net"),
        ("3", "3", "layer", ""),
        ("lm_head", "lm_head", OUTSIDE, None),
        ("score.dense", "score.dense", OUTSIDE, None),
    ],
)
def test_one_name(name, row, column, stack):
    place = locate([name])[name]
    assert (place.row, place.column, place.stack) == (row, column, stack)


def test_matrices_with_the_same_last_name_are_told_apart_by_as_little_as_it_takes():
    places = locate(layers("h", 1, "attn.c_attn", "attn.c_proj", "mlp.c_proj", "wi", "mlp.wi"))
    assert [place.column for place in places.values()] == ["c_attn", "attn.c_proj", "mlp.c_proj", "wi", "mlp.wi"]
    bert = locate(layers("encoder.layer", 1, "attention.output.dense", "intermediate.dense", "output.dense"))
    assert [place.column for place in bert.values()] == ["attention.output.dense", "intermediate.dense", "output.dense"]


def test_layers_are_ordered_by_number_and_not_by_name():
    assert grid({f"layers.{index}.q": 1 for index in (10, 2, 1)}).rows == ["1", "2", "10"]


def test_encoder_and_decoder_have_rows_of_their_own():
    names = [
        *layers("model.encoder.layers", 2, "self_attn.q_proj", "fc1"),
        *layers("model.decoder.layers", 2, "self_attn.q_proj", "encoder_attn.q_proj", "fc1"),
    ]
    cells = grid({name: index for index, name in enumerate(names)})
    assert cells.rows == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    assert cells.columns == ["self_attn.q_proj", "encoder_attn.q_proj", "fc1"]
    assert cells.breaks == [2]
    expected = [[0, np.nan, 1], [2, np.nan, 3], [4, 5, 6], [7, 8, 9]]
    np.testing.assert_array_equal(cells.values, expected)


def test_targets_outside_any_layer_stand_below_in_a_column_of_their_own():
    cells = grid({"embed": 4, "layers.0.q": 1, "layers.1.q": 2, "layers.1.v": 3, "lm_head": 5})
    assert cells.rows == ["0", "1", "embed", "lm_head"]
    assert cells.columns == ["q", "v", OUTSIDE]
    nan = np.nan
    np.testing.assert_array_equal(cells.values, [[1, nan, nan], [2, 3, nan], [nan, nan, 4], [nan, nan, 5]])
    assert cells.breaks == [2]


def test_experts_of_a_layer_share_a_cell_that_holds_their_mean():
    cells = grid({"layers.0.experts.0.w": 2, "layers.0.experts.1.w": 6, "layers.1.experts.0.w": 5})
    np.testing.assert_array_equal(cells.values, [[4], [5]])
    np.testing.assert_array_equal(cells.counts, [[2], [1]])
