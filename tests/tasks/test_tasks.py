"""Every row of the table of domains keeps what `evatune.tasks.task` promises in its name."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys

import pytest
import transformers

from evatune.errors import EvaError
from evatune.recipe import Recipe, all_settings, load_recipe
from evatune.settings import field_docs
from evatune.tasks import DOMAINS, collect, collecting_domains, find_domain, open_task
from evatune.tasks.generation.settings import GenerationData
from evatune.tasks.settings import DataSettings, ModelSettings
from evatune.tasks.understanding.classification import Classification
from evatune.tasks.understanding.kinds import KINDS
from evatune.tasks.understanding.settings import UnderstandingData

METRICS_OF = ("vision.evaluation", "control.task")
"""Homes of the metrics of tasks whose every run has the same ones."""


@pytest.mark.parametrize("name", DOMAINS)
def test_a_row_is_complete(name):
    domain = DOMAINS[name]
    assert callable(importlib.import_module(domain.home).open_task)
    names = {field.name for field in dataclasses.fields(domain.settings)}
    assert set(domain.required) <= names
    assert names == set(field_docs(domain.settings))
    assert type(Recipe(task=name).data) is domain.settings
    assert domain.head is None or "max_length" in names  # of rows of tokens


def test_the_metrics_that_are_stated_are_those_that_scores_have():
    vision, control = (importlib.import_module(f"evatune.tasks.{name}").METRICS for name in METRICS_OF)
    assert set(DOMAINS["vision"].metrics(None)) == set(vision)
    assert set(DOMAINS["control"].metrics(None)) == set(control)
    for kind, made in KINDS.items():
        data = UnderstandingData(kind=kind)
        labels = [("a", "b"), ("a", "b", "c"), ("B-a", "O")]
        assert set(data.metrics()) == {name for own in labels for name in made(data=data).metrics(own)}
    for classes in ("ab", "abc"):
        data = UnderstandingData(classes=tuple(classes))
        assert set(data.metrics()) == set(Classification(data=data).metrics(classes))


def test_what_examples_are_scored_by_says_which_metrics_there_are():
    assert GenerationData().metrics() == ("loss", "exact", "accuracy")
    assert GenerationData(scoring="generated").metrics() == ("generated", "pass@1")
    both = GenerationData(scoring="both", samples=20, temperature=1.0)
    assert both.metrics() == ("loss", "exact", "accuracy", "generated", "pass@1", "pass@10", "pass@20")


def test_settings_of_one_name_are_of_one_kind_in_every_domain():
    """They share an option of the command line."""
    kinds: dict[str, set[str]] = {}
    for domain in DOMAINS.values():
        for field in dataclasses.fields(domain.settings):
            kinds.setdefault(field.name, set()).add(str(field.type))
    assert {name for name, found in kinds.items() if len(found) > 1} <= {"format"}
    assert len({setting.option for setting in all_settings()}) == len(all_settings())


def test_the_table_of_domains_needs_no_torch():
    code = "import sys, evatune.tasks; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def write_config(folder, config):
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "fits", "others"),
    [
        (transformers.LlamaConfig(), ["generation", "understanding"], "generation or understanding"),
        (transformers.BertConfig(), ["understanding"], "understanding"),
        (transformers.BertConfig(is_decoder=True), ["generation", "understanding"], "generation or understanding"),
        (transformers.T5Config(), ["understanding"], "understanding"),
        (transformers.ViTConfig(), ["vision"], "vision"),
        (transformers.DecisionTransformerConfig(), ["generation", "understanding", "vision"], ""),  # transformers'
    ],
    ids=["Llama", "BERT", "BERT decoder", "T5", "ViT", "one that no class of transformers tells of"],
)
def test_a_model_for_another_domain_is_refused_and_the_domain_named(tmp_path, config, fits, others):
    """A masked language model loads as a causal one, and learns to copy the next token that it sees."""
    model = ModelSettings(name=write_config(tmp_path / "model", config))
    for name in ("generation", "understanding", "vision"):
        if name in fits:
            open_task(name, DOMAINS[name].settings(), model=model, seed=0)
        else:
            with pytest.raises(EvaError, match=rf"does not fit task '{name}', where .* is one for task {others} "):
                open_task(name, DOMAINS[name].settings(), model=model, seed=0)


def test_unknown_tasks_and_wrong_sections():
    with pytest.raises(EvaError, match=r"task is 'generatoin', but must be one of generation.* \(did you mean 'gen"):
        load_recipe(None, {"task": "generatoin"})
    with pytest.raises(EvaError, match="task is None, but must be one of"):
        find_domain(None)  # type: ignore[arg-type]
    with pytest.raises(EvaError, match="data is a DataSettings, but task 'generation' needs a GenerationData"):
        Recipe(data=DataSettings())
    with pytest.raises(EvaError, match="no model folder"):
        _ = open_task("generation", Recipe().data, model=ModelSettings(name="./nowhere"), seed=0).train


@pytest.mark.parametrize("name", collecting_domains())
def test_a_folder_that_cannot_be_written_is_told_before_data_are_made(name, monkeypatch, tmp_path):
    monkeypatch.setattr(f"{DOMAINS[name].home}.collect", lambda *a, **o: pytest.fail("data were made"))
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaError, match=r"cannot write .*file: .*file is not a writable folder; choose another output"):
        collect(name, DOMAINS[name].settings(), folder=tmp_path / "file")
