from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Return an example as a module, given its name."""
    monkeypatch.syspath_prepend(EXAMPLES)  # where a program finds what lies beside it

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"evatune_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
