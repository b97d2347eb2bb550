"""Redistribution of ranks, on numbers made by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evatune import EvaError, RankPlan
from evatune.allocation import METRICS, ComponentVariances, allocate
from evatune.settings import max_components

PLENTY = settings(max_examples=60, deadline=None, derandomize=True)


def target(variances, *, total=None, n_rows=101, in_features=64, out_features=32):
    variances = np.asarray(variances, dtype=np.float64)
    return ComponentVariances(
        explained_variance=variances,
        total_variance=float(variances.sum() * 1.25 if total is None else total),
        n_rows=n_rows,
        in_features=in_features,
        out_features=out_features,
    )


@st.composite
def many_targets(draw, n_kept=8):
    n = draw(st.integers(1, 6))
    values = st.lists(st.floats(0, 100, allow_nan=False), min_size=n_kept, max_size=n_kept)
    targets = {}
    for i in range(n):
        variances = sorted(draw(values), reverse=True)
        rest = draw(st.floats(0, 50))
        targets[f"t{i}"] = target(variances, total=sum(variances) + rest)
    return targets


HAND = {
    "a": target([8.0, 4.0, 2.0, 1.0], total=20.0, n_rows=51),
    "b": target([0.9, 0.6, 0.3, 0.1], total=2.0, n_rows=201),
    "c": target([5.0, 5.0, 5.0, 5.0], total=100.0, n_rows=11),
}


def formulas(metric, t):
    """The five metrics, straight from their definitions."""
    lam = t.explained_variance
    sigma = np.sqrt(lam * (t.n_rows - 1))
    return {
        "ratio": sigma**2 / ((t.n_rows - 1) * t.total_variance),
        "paper": sigma**2 / ((t.n_rows - 1) * np.abs(sigma).sum()),
        "raw": lam,
        "max": lam / lam[0],
        "sum": lam / lam.sum(),
    }[metric]


@pytest.mark.parametrize("metric", ["ratio", "paper", "raw", "max", "sum"])
@pytest.mark.parametrize("name", list(HAND))
def test_metrics_are_their_formulas(metric, name):
    np.testing.assert_allclose(METRICS[metric](HAND[name]), formulas(metric, HAND[name]), rtol=1e-12)


def test_the_metrics_by_hand():
    assert METRICS["ratio"](HAND["a"]).tolist() == [0.4, 0.2, 0.1, 0.05]
    assert METRICS["max"](HAND["b"]).tolist() == pytest.approx([1.0, 2 / 3, 1 / 3, 1 / 9])
    assert METRICS["sum"](HAND["c"]).tolist() == [0.25] * 4
    # σ = √(50 λ) = 20, √200, 10, √50, their sum 51.2132
    assert METRICS["paper"](HAND["a"])[0] == pytest.approx(8 / (20 + 200**0.5 + 10 + 50**0.5))


@pytest.mark.parametrize("metric", list(METRICS))
def test_the_components_with_the_highest_scores_are_taken(metric):
    plan = allocate(HAND, rank=2, rho=2.0, metric=metric)
    everything = sorted(
        ((score, -j, -i) for i, t in enumerate(HAND.values()) for j, score in enumerate(formulas(metric, t))),
        reverse=True,
    )
    counts = [sum(-i == k for _, _, i in everything[:6]) for k in range(3)]
    assert list(plan.ranks.values()) == counts and plan.total == plan.budget == 6
    assert plan.metric == metric


def test_metrics_disagree_where_they_should():
    plans = {metric: tuple(allocate(HAND, rank=2, rho=2.0, metric=metric).ranks.values()) for metric in METRICS}
    assert plans["raw"] == (2, 0, 4) and plans["ratio"] == (3, 3, 0) and plans["max"] == (1, 1, 4)


@PLENTY
@given(targets=many_targets(), rank=st.integers(1, 4), rho=st.floats(1.0, 2.0), metric=st.sampled_from(list(METRICS)))
def test_the_budget_is_spent_and_the_cap_is_kept(targets, rank, rho, metric):
    plan = allocate(targets, rank=rank, rho=rho, metric=metric)
    assert plan.budget == rank * len(targets) == plan.total
    assert all(0 <= given <= max_components(rank, rho) for given in plan.ranks.values())
    assert list(plan.ranks) == list(plan.alphas) == list(plan.explained) == list(targets)
    assert all(0 <= share <= 1 + 1e-12 for share in plan.explained.values())


@PLENTY
@given(targets=many_targets(), rank=st.integers(1, 8), metric=st.sampled_from(list(METRICS)))
def test_rho_one_is_uniform(targets, rank, metric):
    plan = allocate(targets, rank=rank, rho=1.0, metric=metric, lora_alpha=3.0)
    assert set(plan.ranks.values()) == {rank} and set(plan.alphas.values()) == {3.0}
    assert plan.n_parameters == plan.uniform_parameters


@PLENTY
@given(targets=many_targets(), rank=st.integers(1, 4), seed=st.integers(0, 1000))
def test_no_other_allocation_explains_more(targets, rank, seed):
    """Of all feasible ones, the sum of explained shares is greatest: compared with random ones."""
    plan = allocate(targets, rank=rank, rho=2.0)

    def explained(ranks):
        return sum(
            t.explained_variance[:r].sum() / t.total_variance
            for t, r in zip(targets.values(), ranks, strict=True)
            if t.total_variance > 0
        )

    best = explained(plan.ranks.values())
    assert best == pytest.approx(sum(plan.explained.values()))
    rng = np.random.default_rng(seed)
    for _ in range(20):
        ranks = np.zeros(len(targets), dtype=int)
        for _ in range(plan.budget):
            ranks[rng.choice(np.flatnonzero(ranks < 2 * rank))] += 1
        assert explained(ranks) <= best + 1e-9


@PLENTY
@given(targets=many_targets(), metric=st.sampled_from(list(METRICS)))
def test_a_larger_budget_takes_nothing_away_where_the_cap_is_the_same(targets, metric):
    smaller = allocate(targets, rank=2, rho=4.0, metric=metric).ranks
    larger = allocate(targets, rank=4, rho=2.0, metric=metric).ranks
    assert all(smaller[name] <= larger[name] for name in targets)


def test_ties_go_round_and_always_the_same_way():
    equal = {name: target([1.0] * 8) for name in "abc"}
    assert allocate(equal, rank=2, rho=4.0).ranks == {"a": 2, "b": 2, "c": 2}
    uneven = allocate(equal, rank={"a": 2, "b": 2, "c": 3}, rho=2.0).ranks
    assert uneven == {"a": 3, "b": 2, "c": 2}, "the first of the model first"
    assert all(allocate(equal, rank=2, rho=4.0) == allocate(equal, rank=2, rho=4.0) for _ in range(5))


def test_a_target_may_get_nothing():
    plan = allocate({"strong": target([9, 8, 7, 6]), "weak": target([0.1] * 4, total=100.0)}, rank=2, rho=2.0)
    assert plan.ranks == {"strong": 4, "weak": 0}
    assert plan.alphas["weak"] == 0.0 and plan.explained["weak"] == 0.0


@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("position", [0, 1])
def test_an_input_that_never_varies_comes_last(metric, position):
    constant, varying = target([0.0] * 4, total=0.0), target([1e-9, 1e-10, 1e-11, 1e-12], total=1.0)
    targets = (
        {"constant": constant, "varying": varying} if position == 0 else {"varying": varying, "constant": constant}
    )
    plan = allocate(targets, rank=2, rho=2.0, metric=metric)
    assert plan.ranks == {"constant": 0, "varying": 4}
    assert plan.explained["constant"] == 0.0 and not math.isnan(sum(plan.explained.values()))
    assert allocate({"constant": constant}, rank=2, rho=2.0, metric=metric).ranks == {"constant": 2}


def test_rounding_cannot_put_a_later_component_before_an_earlier_one():
    wobbly = target([1.0, 1.0, 1.0 + 1e-12, 0.5])
    assert allocate({"a": wobbly, "b": target([1.0] * 4)}, rank=1, rho=4.0, metric="raw").ranks == {"a": 1, "b": 1}


def test_a_target_narrower_than_its_cap_takes_what_it_can():
    narrow = target([3.0, 2.0, 1.0], in_features=3)
    wide = target([1.0] * 16, total=1e6, in_features=64)
    plan = allocate({"narrow": narrow, "wide": wide}, rank=8, rho=2.0)
    assert plan.ranks == {"narrow": 3, "wide": 13} and plan.total == plan.budget == 16
    alone = allocate({"narrow": narrow}, rank=8, rho=2.0)
    assert alone.ranks == {"narrow": 3} and (alone.budget, alone.total) == (8, 3)


def test_ranks_and_alphas_of_each_target():
    targets = {"a": target([9.0, 8, 7, 6, 5, 4, 3, 2]), "b": target([1.0] * 8, total=1e3)}
    plan = allocate(targets, rank={"a": 2, "b": 4}, rho=2.0, lora_alpha={"a": 10.0, "b": 16})
    assert plan.base_ranks == {"a": 2, "b": 4} and plan.budget == 6
    assert plan.ranks == {"a": 4, "b": 2}, "each capped by its own rank"
    assert plan.alphas == {"a": 20.0, "b": 8.0}


@PLENTY
@given(targets=many_targets(), rank=st.integers(1, 4), alpha=st.floats(0.1, 64), use_rslora=st.booleans())
def test_the_scale_stays(targets, rank, alpha, use_rslora):
    plan = allocate(targets, rank=rank, rho=2.0, lora_alpha=alpha, use_rslora=use_rslora)

    def scale(a, r):
        return a / r**0.5 if use_rslora else a / r

    for name, given_rank in plan.ranks.items():
        if given_rank:
            assert scale(plan.alphas[name], given_rank) == pytest.approx(scale(alpha, rank))
    assert plan.use_rslora is use_rslora


def test_parameters_are_counted():
    targets = {
        "a": target([9.0, 8, 7, 6], in_features=10, out_features=20),
        "b": target([1.0] * 4, total=1e3, in_features=100, out_features=5),
    }
    plan = allocate(targets, rank=2, rho=2.0)
    assert plan.ranks == {"a": 4, "b": 0}
    assert plan.n_parameters == 4 * 30 and plan.uniform_parameters == 2 * 30 + 2 * 105


def test_a_plan_goes_through_json_unchanged():
    plan = allocate(HAND, rank=2, rho=1.5, metric="paper", lora_alpha=7, use_rslora=True)
    text = json.dumps(plan.to_json())
    assert RankPlan.from_json(json.loads(text)) == plan
    assert json.loads(text)["budget"] == 6 and json.loads(text)["total"] == 6


def test_json_that_is_no_plan_is_refused():
    whole = allocate(HAND, rank=2).to_json()
    with pytest.raises(EvaError, match="not a rank plan: the entry 'ranks' is missing"):
        RankPlan.from_json({name: value for name, value in whole.items() if name != "ranks"})


@pytest.mark.parametrize("entry", ["ranks", "alphas", "base_ranks", "in_features", "out_features"])
def test_a_plan_that_was_edited_must_name_the_same_targets_everywhere(entry):
    whole = allocate(HAND, rank=2).to_json()
    with pytest.raises(EvaError, match=r"the entry '\w+' of the plan does not name the same targets"):
        RankPlan.from_json(whole | {entry: {"a": whole[entry]["a"]}})
    with pytest.raises(EvaError, match=f"the entry {entry!r} of the plan does not name the same targets"):
        RankPlan.from_json(whole | {entry: [2, 2]})


def test_the_table_has_one_line_a_kind_of_matrix():
    targets = {f"layers.{i}.{kind}": HAND[name] for i in range(2) for kind, name in (("q", "a"), ("up", "b"))}
    table = allocate(targets, rank=2, rho=2.0).table()
    assert "8 of 8 components over 4 targets (rho 2, metric ratio)" in table
    assert sum(line.split()[:2] == ["q", "2"] or line.split()[:2] == ["up", "2"] for line in table.splitlines()) == 2
    assert "trainable parameters" in table and "against uniform ranks" in table


@pytest.mark.parametrize(
    ("rank", "rho", "most"), [(16, 2.0, 32), (16, 1.0, 16), (1, 1.5, 2), (3, 1.5, 5), (5, 1.1, 6), (4, 1.1, 4)]
)
def test_the_cap_is_rounded_with_halves_up(rank, rho, most):
    assert max_components(rank, rho) == most


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0, but must be at least 1"),
        ({"rank": -2}, "rank is -2, but"),
        ({"rank": 1.5}, "rank is 1.5, but must be a whole number"),
        ({"rank": True}, "rank is True, but must be a whole number"),
        ({"rank": "eight"}, "rank is 'eight', but must be a whole number"),
        ({"rank": None}, "rank is None, but must be a whole number"),
        ({"rank": float("nan")}, "rank is nan, but must be a whole number"),
        ({"rank": float("inf")}, "rank is inf, but must be a whole number"),
        ({"rank": {"a": 2, "b": 0, "c": 2}}, "rank of 'b' is 0, but must be at least 1"),
        ({"rank": {"a": 2}}, "rank names no value for 2 targets, the first 'b'"),
        ({"lora_alpha": {"a": 2.0, "b": 1.0}}, "lora_alpha names no value for 1 targets, the first 'c'"),
        ({"rho": 0.99}, "rho is 0.99, but must be at least 1"),
        ({"rho": float("nan")}, "rho is nan, but must be a number"),
        ({"rho": float("inf")}, "rho is inf, but must be a number"),
        (
            {"metric": "ratios"},
            "metric is 'ratios', but must be one of ratio, paper, raw, max, sum .did you mean 'ratio'",
        ),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, but must be a number"),
        ({"rnak": 4}, r"allocate has no option 'rnak' .did you mean 'rank'"),
        ({"rank": 4, "rho": 2.0}, "rank 4 with rho 2 needs 8 components, but 4 were kept of a; measure with n_comp"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(EvaError, match=message):
        allocate(HAND, **{"rank": 2} | settings)


def test_no_targets_are_refused():
    with pytest.raises(EvaError, match="no targets to allocate ranks to"):
        allocate({})


def test_fewer_components_than_the_cap_are_enough_where_the_input_is_no_wider():
    assert allocate({"a": target([1.0, 0.5], in_features=2)}, rank=1, rho=4.0).ranks == {"a": 1}


def test_planning_thousands_of_targets_takes_milliseconds():
    import time

    rng = np.random.default_rng(0)
    targets = {f"t{i}": target(np.sort(rng.random(32))[::-1]) for i in range(1000)}
    allocate(targets, rank=16, rho=2.0)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        allocate(targets, rank=16, rho=2.0)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.25


def test_the_explained_share_is_at_most_one_whatever_rounding_did():
    plan = allocate({"a": target([0.7, 0.3], total=1.0 - 1e-7)}, rank=2, rho=1.0)
    assert plan.explained["a"] == 1.0
