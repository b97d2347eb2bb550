"""The list of faults keeps up with the sources; `make mutants` puts them in."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def test_every_fault_is_found_once_in_the_sources_and_its_tests_are_there(monkeypatch):
    spec = importlib.util.spec_from_file_location("mutants_run", Path(__file__).with_name("run.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants_run", module)
    spec.loader.exec_module(module)
    assert len(module.read_faults()) >= 170
