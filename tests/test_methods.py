from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import evatune
from evatune.errors import EvaError
from evatune.methods import EXAMPLES, METHODS, OPTIONS, at_home, parse_method


@pytest.mark.parametrize(
    ("name", "start", "options"),
    [
        ("eva", "eva", set()),
        ("dora", "lora", {"dora"}),
        ("lora+", "lora", {"lora+"}),
        ("eva+lora+", "eva", {"lora+"}),
        ("eva+lora++dora", "eva", {"lora+", "dora"}),
        ("lora+dora", "lora", {"dora"}),
        ("dora+eva", "eva", {"dora"}),
        ("PiSSA+rslora", "pissa", {"rslora"}),
        ("lora-ga+lora+", "lora-ga", {"lora+"}),
        ("eva+qlora", "eva", {"qlora"}),
    ],
)
def test_names_are_a_start_and_options(name, start, options):
    choice = parse_method(name)
    assert choice.method.name == start
    assert choice.options == options


@pytest.mark.parametrize("name", [*METHODS, *OPTIONS, *EXAMPLES])
def test_every_name_that_is_offered_is_read(name):
    assert parse_method(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pisa", r"no method 'pisa' \(did you mean 'pissa'"),
        ("", "there is no method ''; methods are full, lora,"),
        ("eva+pissa", "names 2 starts, eva and pissa: A can start in one way only"),
        ("dora+dora", "names an option twice"),
        ("full+dora", "full has no adapter: all weights are trained, but dora trains magnitude"),
        ("pissa+qlora", "pissa computes a new base weight, which 4 bits cannot hold exactly, but qlora holds"),
        ("vera+rslora", "vera has a scale and parameters of its own"),
        ("adalora+lora+", "adalora learns a singular value decomposition"),
        ("lora-ga+qlora", "needs the gradient of the weights"),
    ],
)
def test_senseless_names_are_refused_with_the_reason(name, message):
    with pytest.raises(EvaError, match=message):
        parse_method(name)


def test_rows_point_to_functions_and_every_idea_is_one_sentence():
    for method in METHODS.values():
        for home in (method.config, method.start, *method.callbacks):
            assert not home or callable(at_home(home))
        assert method.idea.endswith(".")
        assert method.idea.count(". ") == 0
    for option in OPTIONS.values():
        assert not option.optimizer or callable(at_home(option.optimizer))


def test_no_other_code_asks_for_the_name_of_a_method():
    source = Path(evatune.__file__).parent
    names = "|".join(re.escape(f'"{name}"') for name in [*METHODS, *OPTIONS])
    asks = re.compile(rf"(==|!=|\bin\b) *({names})|({names}) *(==|!=|\bin\b) ")
    found = [
        f"{path.relative_to(source)}: {line.strip()}"
        for path in source.rglob("*.py")
        if path.name != "methods.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if asks.search(line) and "init_lora_weights" not in line  # PEFT's own names
    ]
    assert not found


def test_the_registry_loads_without_torch():
    code = "import sys, evatune.methods; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


DOCS = Path(__file__).parents[1] / "docs" / "methods"


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_a_page_says_what_a_reader_needs_to_choose(path):
    text = path.read_text(encoding="utf-8")
    if path.stem == "index":
        linked = set(re.findall(r"\]\(([a-z-]+)\.md\)", text))
        assert linked == {page.stem for page in DOCS.glob("*.md")} - {"index"}
        assert all(re.search(rf"[\[`]{re.escape(name)}[\]`]", text) for name in [*METHODS, *OPTIONS])
        return
    assert "```math" in text
    parts = re.findall(r"^\*\*(\w[\w ]*)\.\*\*", text, flags=re.MULTILINE)
    assert {"Cost", "Base weights", "When", "Reference"} <= set(parts), parts
