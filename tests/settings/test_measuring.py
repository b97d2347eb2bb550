"""The options of measuring and planning: one declaration that the recipe, the calls and saved spectra share."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import typing

import pytest
import torch

import evatune
from evatune.allocation import METRICS
from evatune.errors import EvaError
from evatune.pca.streaming import BACKENDS
from evatune.recipe import AdapterSettings, MeasureSettings, Recipe
from evatune.settings import Measuring, Planning, Targets, field_docs, max_components
from evatune.settings.measuring import Backend, Budget, Metric


def test_choices_are_what_is_registered():
    assert typing.get_args(Metric) == tuple(METRICS)
    assert typing.get_args(Backend) == tuple(BACKENDS)
    assert typing.get_args(Budget) == ("components", "parameters")


def test_every_option_has_a_text():
    for cls in (Measuring, Planning, AdapterSettings, MeasureSettings):
        docs = field_docs(cls)
        assert list(docs) == cls.field_names() and all(text.endswith(".") for text in docs.values())


@pytest.mark.parametrize(
    ("call", "cls"), [(evatune.measure, Measuring), (evatune.estimate, Measuring), (evatune.Spectra.plan, Planning)]
)
def test_calls_show_their_options(call, cls):
    assert set(cls.field_names()) <= set(inspect.signature(call).parameters)


def test_initialize_shows_the_options_that_its_adapter_leaves_open():
    of_the_adapter = {*Targets.field_names(), "rank", "train_a"}
    shown = set(inspect.signature(evatune.initialize).parameters)
    assert set(Measuring.field_names()) - of_the_adapter <= shown
    assert not of_the_adapter & shown


def test_torch_objects_may_stand_for_their_names():
    settings = Measuring(dtype=torch.bfloat16, state_device=torch.device("cpu"))
    assert (settings.dtype, settings.state_device) == ("bfloat16", "cpu")
    assert Measuring(**json.loads(json.dumps(settings.to_json()))) == settings


@pytest.mark.parametrize(("rank", "rho", "kept"), [(None, 2.0, 32), (5, 2.5, 13), ({"a": 2, "b": 7}, 1.5, 11)])
def test_as_many_components_are_kept_as_a_plan_can_ask_for(rank, rho, kept):
    assert Measuring(rank=rank, rho=rho).n_kept == kept
    if rank is not None:
        with pytest.raises(EvaError, match=f"n_components is {kept - 1}, but rank . with rho .* needs at least {kept}"):
            Measuring(rank=rank, rho=rho, n_components=kept - 1)


def test_a_recipe_rounds_as_the_plan_does():
    assert max_components(5, 2.5) == 13
    with pytest.raises(EvaError, match=r"n_components is 12, but rank 5 with rho 2\.5 needs at least 13"):
        Recipe.from_dict({"adapter": {"rank": 5, "rho": 2.5}, "measure": {"n_components": 12}})


def test_a_recipe_hands_every_option_on():
    recipe = Recipe.from_dict(
        {
            "adapter": {"rank": 4, "rho": 1.5, "budget": "parameters", "train_a": False, "target_modules": "q,v"},
            "measure": {"tau": None, "tolerance": 1e-2, "max_batches": 7, "use_label_mask": True},
            "train": {"seed": 3, "precision": "bf16"},
        }
    )
    assert recipe.measuring == Measuring(
        rank=4,
        rho=1.5,
        budget="parameters",
        train_a=False,
        target_modules=("q", "v"),
        tau=None,
        tolerance=1e-2,
        max_batches=7,
        use_label_mask=True,
        seed=3,
        dtype="bfloat16",
    )
    assert Recipe.from_dict({"adapter": {"method": "eva-max"}}).measuring.metric == "max"


def test_settings_are_read_without_torch():
    code = "import sys, evatune.settings, evatune.recipe; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
