"""A budget in trainable parameters, and factors on the scores of targets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evatune.allocation import ComponentVariances, RankPlan, allocate
from evatune.errors import EvaError


def target(variances: list[float], *, in_features: int = 64, out_features: int = 64) -> ComponentVariances:
    return ComponentVariances(
        explained_variance=np.array(variances),
        total_variance=10.0,
        n_rows=100,
        in_features=in_features,
        out_features=out_features,
    )


def test_a_component_of_a_wide_target_costs_more():
    targets = {"wide": target([3.0, 2.9], out_features=576), "narrow": target([1.0, 0.9])}
    assert allocate(targets, rank=1).ranks == {"wide": 2, "narrow": 0}
    plan = allocate(targets, rank=1, budget="parameters")
    assert plan.ranks == {"wide": 0, "narrow": 2}  # 1.0 / 128 beats 3.0 / 640, and what is left does not pay a wide one
    assert plan.budget_in == "parameters"


def test_a_frozen_a_costs_nothing():
    # An input that is nine times as wide matters only while its rows of A are trained.
    targets = {"wide in": target([1.2, 1.1], in_features=576), "wide out": target([1.0, 0.9], out_features=128)}
    assert allocate(targets, rank=1, budget="parameters").ranks == {"wide in": 0, "wide out": 2}
    plan = allocate(targets, rank=1, budget="parameters", train_a=False)
    assert plan.ranks == {"wide in": 2, "wide out": 0}
    assert (plan.n_parameters, plan.uniform_parameters) == (2 * 64, 64 + 128)
    assert not plan.train_a and RankPlan.from_json(plan.to_json()) == plan
    assert "128 trainable parameters of B, -33.3% against uniform ranks" in plan.table()


def test_what_is_frozen_is_not_counted_but_changes_no_plan_in_components():
    targets = {"a": target([3.0, 2.0], in_features=100), "b": target([1.0, 0.5])}
    frozen, trained = (allocate(targets, rank=1, train_a=train_a) for train_a in (False, True))
    assert frozen.ranks == trained.ranks == {"a": 2, "b": 0}
    assert (frozen.n_parameters, frozen.uniform_parameters) == (2 * 64, 64 + 64)
    assert (trained.n_parameters, trained.uniform_parameters) == (2 * 164, 164 + 128)


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 6), rho=st.floats(1, 3), train_a=st.booleans())
@settings(max_examples=50, deadline=None)
def test_no_more_parameters_are_spent_than_uniform_lora_has_and_what_is_left_pays_nothing(seed, rank, rho, train_a):
    random = np.random.default_rng(seed)
    targets = {
        f"t{i}": target(
            sorted(random.exponential(size=18), reverse=True),
            in_features=int(random.integers(18, 200)),
            out_features=int(random.integers(8, 200)),
        )
        for i in range(5)
    }
    plan = allocate(targets, rank=rank, rho=rho, budget="parameters", train_a=train_a)
    left = plan.uniform_parameters - plan.n_parameters
    cap = int(rho * rank + 0.5)
    assert left >= 0
    assert all(0 <= count <= cap for count in plan.ranks.values())
    for name, count in plan.ranks.items():
        assert count == cap or train_a * targets[name].in_features + targets[name].out_features > left


@pytest.mark.parametrize("budget", ["components", "parameters"])
def test_rho_of_one_is_uniform_whatever_the_budget(budget):
    targets = {"a": target([5.0, 1.0], out_features=999), "b": target([2.0, 0.1])}
    assert allocate(targets, rank=2, rho=1, budget=budget).ranks == {"a": 2, "b": 2}


def test_weights_multiply_the_scores():
    targets = {"a": target([2.0, 1.0]), "b": target([1.9, 0.9])}
    assert allocate(targets, rank=1).ranks == {"a": 1, "b": 1}
    assert allocate(targets, rank=1, weights={"a": 1.0, "b": 3.0}).ranks == {"a": 0, "b": 2}


def test_a_plan_from_before_budgets_is_read_as_one_in_components():
    data = allocate({"a": target([2.0, 1.0])}, rank=1, budget="parameters").to_json()
    assert RankPlan.from_json(data).budget_in == "parameters"
    del data["budget_in"]
    assert RankPlan.from_json(data).budget_in == "components"
    del data["train_a"]
    assert RankPlan.from_json(data).train_a
    with pytest.raises(EvaError, match="the entry 'ranks' is missing"):
        RankPlan.from_json({name: value for name, value in data.items() if name != "ranks"})


def test_the_table_says_what_the_budget_is_in():
    targets = {"a": target([2.0, 1.0])}
    assert "budget in parameters" in allocate(targets, rank=1, budget="parameters").table()
    assert "budget" not in allocate(targets, rank=1).table()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "parameter"}, r"budget is 'parameter', but must be one of components, parameters \(did you mean"),
        ({"weights": {"b": 1.0}}, "weights names no value for 1 targets, the first 'a'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(EvaError, match=message):
        allocate({"a": target([2.0, 1.0])}, rank=1, **options)
