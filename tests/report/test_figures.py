from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch

from evatune.allocation import RankPlan
from evatune.errors import EvaError
from evatune.report.figures import (
    explained_variance_curves,
    gradient_norms,
    loss_curves,
    rank_heatmap,
    ranks_by_matrix,
    rate_curves,
    series,
    trailing_mean,
)
from evatune.report.style import colours, looks
from evatune.spectra import Spectra, Spectrum, Target

LOG = [{"step": 2, "loss": 1.0, "grad_norm": 0.5}, {"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 0.7}]


def plan(ranks: dict[str, int], base: int = 4) -> RankPlan:
    same = dict.fromkeys(ranks, 8)
    return RankPlan(
        ranks=ranks,
        alphas=dict.fromkeys(ranks, 1.0),
        base_ranks=dict.fromkeys(ranks, base),
        explained=dict.fromkeys(ranks, 0.5),
        in_features=same,
        out_features=same,
        rho=2.0,
        metric="ratio",
    )


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_heat_map_shows_ranks_and_their_changes():
    figure = rank_heatmap(plan({"layers.0.q": 0, "layers.0.v": 8, "layers.1.q": 4, "lm_head": 3}))
    left, right = figure.axes[:2]
    nan = np.nan
    np.testing.assert_array_equal(left.images[0].get_array().filled(nan), [[0, 8, nan], [4, nan, nan], [nan, nan, 3]])
    np.testing.assert_array_equal(
        right.images[0].get_array().filled(nan), [[-4, 4, nan], [0, nan, nan], [nan, nan, -1]]
    )
    assert texts(left) == ["0", "8", "4", "3"]
    assert texts(right) == ["−4", "+4", "0", "−1"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["0", "1", "lm_head"]
    assert left.images[0].get_clim() == (0, 8)
    assert right.images[0].get_clim() == (-4, 4)


def test_uniform_ranks_are_drawn_around_zero():
    right = rank_heatmap(plan({"layers.0.q": 4, "layers.1.q": 4})).axes[1]
    assert texts(right) == ["0", "0"]
    assert right.images[0].get_clim() == (-1, 1)


def test_a_deep_model_is_drawn_without_numbers_in_the_cells():
    figure = rank_heatmap(plan({f"layers.{i}.{m}": 4 for i in range(80) for m in "qkvogud"} | {"lm_head": 4}))
    assert texts(figure.axes[0]) == []
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:3] == ["0", "2", "4"]
    assert labels[-1] == "lm_head"
    assert figure.get_size_inches()[1] < 13


def test_experts_are_announced_as_means():
    figure = rank_heatmap(plan({f"layers.0.experts.{i}.w": i for i in range(4)}))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["w (mean of 4)"]


def test_bars_show_the_mean_rank_of_each_matrix():
    axes = ranks_by_matrix(plan({"layers.0.q": 0, "layers.1.q": 6, "layers.0.v": 8})).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [3.0, 8.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "v"]


def test_explained_variance_is_cumulative_and_grouped_by_the_matrices_that_share_an_input():
    def spectrum(*singular_values: float, total: float) -> Spectrum:
        return Spectrum(
            components=torch.eye(3, device="cpu")[: len(singular_values)],
            singular_values=torch.tensor(singular_values, device="cpu"),
            mean=torch.zeros(3, device="cpu"),
            total_variance=total,
            n_rows=2,
            n_batches=1,
            stopped="converged",
            backend="exact",
        )

    targets = {
        name: Target(name=name, input=key, in_features=3, out_features=3)
        for name, key in {
            "layers.0.q": "layers.0.q",
            "layers.0.k": "layers.0.q",
            "layers.0.o": "layers.0.o",
            "layers.1.o": "layers.1.o",
        }.items()
    }
    inputs = {
        "layers.0.q": spectrum(2.0, 1.0, total=10.0),
        "layers.0.o": spectrum(1.0, 1.0, total=2.0),
        "layers.1.o": spectrum(1.0, total=4.0),
    }
    figure = explained_variance_curves(Spectra(targets=targets, inputs=inputs))
    lines = figure.axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), [0, 0.4, 0.5])
    labelled = {line.get_label(): line.get_ydata() for line in lines if not line.get_label().startswith("_")}
    assert list(labelled) == ["q, k (1 input)", "o (2 inputs)"]
    np.testing.assert_allclose(labelled["o (2 inputs)"], [0, 0.375, 1.0])


def test_loss_curves_are_in_order_of_steps_and_mark_held_out_losses():
    axes = loss_curves({"EVA": LOG, "other": LOG[:2]}, smooth=2).axes[0]
    labelled = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(labelled) == ["EVA, mean of 2 steps", "other, mean of 2 steps", "EVA, held out"]
    np.testing.assert_allclose(labelled["EVA, mean of 2 steps"].get_xydata(), [[1, 3], [2, 2]])
    np.testing.assert_allclose(labelled["EVA, held out"].get_xydata(), [[2, 0.7]])


def test_gradient_norms_skip_runs_that_logged_none():
    axes = gradient_norms({"EVA": LOG, "silent": LOG[1:]}).axes[0]
    assert [line.get_label() for line in axes.lines] == ["EVA"]
    assert axes.get_yscale() == "log"


def test_a_trailing_mean_never_looks_ahead():
    np.testing.assert_allclose(trailing_mean(np.array([4.0, 2.0, 0.0, 6.0]), 3), [4, 3, 2, 8 / 3])


def test_series_skips_entries_without_the_value():
    steps, values = series([{"step": 1}, {"loss": 2.0}, {"step": 3, "loss": None}, {"step": 2, "loss": 5}], "loss")
    np.testing.assert_array_equal(steps, [2])
    np.testing.assert_array_equal(values, [5])


def test_scores_over_the_rate_are_points_in_order_of_rates_with_their_intervals():
    figure = rate_curves(
        {"EVA": {1e-2: (0.2, 0.1, 0.4), 1e-3: (0.3, 0.2, 0.5)}, "LoRA": {1e-3: (0.6, 0.5, 0.7)}}, name="loss"
    )
    axes = figure.axes[0]
    eva, lora = axes.lines
    np.testing.assert_array_equal(eva.get_xydata(), [[1e-3, 0.3], [1e-2, 0.2]])
    np.testing.assert_array_equal(lora.get_xydata(), [[1e-3, 0.6]])
    band = axes.collections[0].get_paths()[0].vertices
    assert {0.1, 0.2, 0.4, 0.5} <= set(band[:, 1])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.001", "0.01"]
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "loss"


@pytest.mark.parametrize(("worst", "scale"), [(3.9, "log"), (0.9, "linear")])
def test_scores_far_apart_get_a_logarithmic_axis(worst, scale):
    figure = rate_curves({"EVA": {1e-3: (0.2, 0.15, 0.25)}, "LoRA": {1e-3: (worst, worst, worst)}}, name="loss")
    assert figure.axes[0].get_yscale() == scale


def test_scores_that_reach_zero_have_a_linear_axis():
    assert rate_curves({"EVA": {1e-3: (0.9, 0.0, 1.0)}}, name="accuracy").axes[0].get_yscale() == "linear"


def test_methods_keep_their_colour_in_whatever_company():
    assert colours(["LoRA", "EVA"])["EVA"] == colours(["EVA", "x"])["EVA"]
    assert len(set(colours(["a", "EVA", "b", "LoRA", "c"]).values())) == 5


def test_runs_of_one_method_share_its_colour_and_differ_in_their_dash():
    look = looks(["EVA 1e-3", "EVA 2e-3", "LoRA 1e-3", ""])
    assert look["EVA 1e-3"]["color"] == look["EVA 2e-3"]["color"] == colours(["EVA"])["EVA"]
    assert look["EVA 1e-3"]["linestyle"] == look["LoRA 1e-3"]["linestyle"] != look["EVA 2e-3"]["linestyle"]


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_figures_are_written_as_their_suffix_says_and_equal_figures_give_equal_files(tmp_path, suffix):
    ranks = {"layers.0.q": 1}
    first, second = tmp_path / f"a.{suffix}", tmp_path / "new" / f"b.{suffix}"
    rank_heatmap(plan(ranks), path=first)
    rank_heatmap(plan(ranks), path=second)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{suffix}", "new"]


def test_the_callers_settings_of_matplotlib_stay_as_they_were():
    with matplotlib.rc_context({"font.size": 3.0, "axes.grid": False, "svg.hashsalt": "mine"}):
        before = dict(matplotlib.rcParams)
        rank_heatmap(plan({"layers.0.q": 1}))
        assert dict(matplotlib.rcParams) == before


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(EvaError, match="no targets"):
        rank_heatmap(plan({}))
    with pytest.raises(EvaError, match="no targets"):
        ranks_by_matrix(plan({}))
    with pytest.raises(EvaError, match=r"'x\.gif'; end its name with \.svg, \.png, \.pdf"):
        rank_heatmap(plan({"layers.0.q": 1}), path=tmp_path / "x.gif")
    with pytest.raises(EvaError, match=r"none of the runs \(EVA\) logged 'loss'"):
        loss_curves({"EVA": [{"step": 1}]})
    with pytest.raises(EvaError, match="no score at any learning rate"):
        rate_curves({"EVA": {}}, name="loss")
    with pytest.raises(EvaError, match="smooth must be at least 1 step, got 0"):
        gradient_norms({"EVA": LOG}, smooth=0)
    with pytest.raises(EvaError, match="no inputs"):
        explained_variance_curves(Spectra(targets={}, inputs={}))
