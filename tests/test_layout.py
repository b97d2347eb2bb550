"""The layout of the code: what each part may import, read from the sources without importing them.

An import under `TYPE_CHECKING` counts for the arrows between parts, since a name in a signature is knowledge too, and
does not count for circles, since it is not there at run time. An import inside a function counts for both.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from evatune.methods import METHODS

REPOSITORY = Path(__file__).parents[1]
SOURCES = REPOSITORY / "src"
MAX_LINES = 500

_VALUES = ("errors", "settings", "files", "tables")
_MEASURED = (*_VALUES, "spectra", "allocation")
_ACTIVATIONS = (*_MEASURED, "pca", "activations")
_ADAPTED = (*_ACTIVATIONS, "activations.layers", "activations.processes", "activations.from_disk")
_ADAPTED += ("activations.measure", "activations.estimate", "activations.gradients", "initialization", "methods")
_ADAPTED += ("models", "hardware", "interruption", "fingerprint")
_TRAINED = (*_ADAPTED, "adapters", "tasks", "recipe")
_RUN = ("activations.results", "activations.planning", "activations.starved")
_RUN += ("hardware", "interruption", "fingerprint")

PARTS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "settings": ("errors",),
    "files": ("errors",),
    "tables": ("errors",),
    "pca": ("errors",),
    "hardware": ("errors", "pca"),
    "fingerprint": ("errors",),
    "models": (*_VALUES, "hardware"),
    "allocation": _VALUES,
    "spectra": (*_VALUES, "allocation"),
    "interruption": (),
    "launch": ("errors", "interruption"),
    # The core of a measurement: what is not named below.
    "activations": ("errors", "settings", "pca"),
    "activations.layers": ("errors", "settings", "pca", "activations"),
    "activations.planning": _ACTIVATIONS,
    "activations.starved": _ACTIVATIONS,
    "activations.results": (*_ACTIVATIONS, "activations.starved"),
    "activations.processes": (*_ACTIVATIONS, "interruption"),
    "activations.gradients": (*_ACTIVATIONS, "activations.layers"),
    "activations.measure": (*_ACTIVATIONS, *_RUN, "activations.layers", "activations.processes"),
    "activations.from_disk": (*_ACTIVATIONS, *_RUN, "activations.layers", "activations.measure", "models"),
    "activations.estimate": (*_ACTIVATIONS, "activations.layers", "activations.measure", "activations.from_disk"),
    "initialization": ("errors",),
    "methods": ("errors", "settings"),
    "adapters": _ADAPTED,
    "tasks": (*_ADAPTED, "adapters"),
    "recipe": (*_VALUES, "methods", "tasks"),
    "training": (*_TRAINED, "launch"),
    "report": _MEASURED,
    "compare": (*_TRAINED, "training"),
    "analyses": _MEASURED,
    "exhibits": (*_TRAINED, "training", "compare", "analyses", "report"),
    "cli": (*_TRAINED, "training", "compare", "exhibits", "report", "launch"),
}
"""What the modules of each part may import beside each other. The longest name that fits a module is its part.

`evatune/__init__.py`, `evatune/__main__.py` and `activations/__init__.py` only hand names on and may import all.
"""

LIBRARIES: dict[str, tuple[str, ...]] = {
    "errors": (),
    "settings": (),
    "files": (),
    "tables": (),
    "methods": (),
    "allocation": ("numpy",),
    "pca": ("torch",),
    "activations": ("torch", "numpy"),  # NumPy's generator is given back as it was
    "initialization": ("torch",),
}
"""All that these parts may import from other projects."""

ONLY_IN = {"peft": "adapters", "bitsandbytes": "adapters", "matplotlib": "report", "yaml": "recipe"}
"""Libraries that one part alone may import."""

SELF = ("self", "cls", "super()")
COMMAND_CONSTANTS = {"SUMMARY", "USAGE", "DESCRIPTION", "EXAMPLES"}
MAX_COMMAND_LINES, MAX_COMMAND_HELPERS = 150, 3


@dataclass(frozen=True)
class Import:
    """One imported name."""

    module: str
    """Full name of the module."""
    name: str | None
    """Name taken from it; None for the module itself."""
    alias: str
    """What it is called here."""
    line: int
    typing_only: bool


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    """Dotted name below `evatune`; empty for `evatune/__init__.py`."""
    path: Path
    is_package: bool

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def part(self) -> str:
        """The part it is in; empty for what only hands names on."""
        if self.name in ("", "__main__") or (self.name == "activations" and self.is_package):
            return ""
        fitting = [part for part in PARTS if f"{self.name}.".startswith(f"{part}.")]
        return max(fitting, key=len, default=f"no part for {self.name}")

    @cached_property
    def imports(self) -> list[Import]:
        typed = {
            id(inner)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    bound = alias.asname or alias.name.partition(".")[0]
                    found.append(Import(alias.name, None, bound, node.lineno, id(node) in typed))
            elif isinstance(node, ast.ImportFrom):
                package = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
                above = ["evatune", *package][: len(package) + 2 - node.level] if node.level else []
                module = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    found.append(Import(module, alias.name, alias.asname or alias.name, node.lineno, id(node) in typed))
        return found

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)}

    @cached_property
    def private_definitions(self) -> set[str]:
        """The private attributes and methods that the classes of this module define."""
        found = set()
        for node in (inner for owner in self.classes.values() for inner in ast.walk(owner)):
            if isinstance(node, ast.FunctionDef) and is_private(node.name):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_private(node.attr):
                found |= {node.attr} if ast.unparse(node.value) in SELF else set()
        return found


def is_private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.endswith("__")


def read_modules(sources: Path) -> dict[str, Module]:
    """Return the modules of `sources/evatune` by name."""
    modules = {}
    for path in sorted((sources / "evatune").rglob("*.py")):
        parts = path.relative_to(sources / "evatune").with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = Module(name, path, is_package)
    return modules


def own_imports(modules: dict[str, Module], module: Module) -> Iterator[tuple[Import, str]]:
    """Yield the imports from evatune, each with the name of the module that it reaches."""
    for found in module.imports:
        if found.module.partition(".")[0] == "evatune":
            reached = found.module.partition(".")[2]
            inside = f"{reached}.{found.name}".lstrip(".")
            yield found, inside if inside in modules else reached


def broken_rules(sources: Path) -> list[str]:
    """Return one line for each place that breaks a rule of the layout."""
    modules = read_modules(sources)
    rules = (arrows, libraries, private_names, private_attributes, classes_of_states, methods, domains, commands)
    broken = [line for module in modules.values() for rule in rules for line in rule(modules, module)]
    return list(dict.fromkeys(broken)) + circles(modules) + too_long(sources)


def arrows(modules: dict[str, Module], module: Module) -> Iterator[str]:
    """A part imports only parts that the table gives it."""
    part = module.part
    if part and part not in PARTS:
        yield f"{module.name}: is in no part of the table"
    elif part:
        for found, reached in own_imports(modules, module):
            other = modules[reached].part if reached in modules else ""
            is_version = (found.module, found.name) == ("evatune", "__version__")
            # Names handed on by `activations/__init__.py` belong to the parts above the core.
            other = "activations.measure" if reached == "activations" else other
            if other not in (part, *PARTS[part]) and not is_version:
                yield f"{module.name}:{found.line}: {part} may not import {reached or 'evatune'}"


def libraries(modules: dict[str, Module], module: Module) -> Iterator[str]:
    """Some parts import few other projects, and some projects are imported by one part."""
    allowed = LIBRARIES.get(module.part)
    for found in module.imports:
        project = found.module.partition(".")[0]
        if project in ("evatune", *sys.stdlib_module_names):
            continue
        if allowed is not None and project not in allowed:
            yield f"{module.name}:{found.line}: {module.part} may not import {project}"
        if project in ONLY_IN and module.part != ONLY_IN[project]:
            yield f"{module.name}:{found.line}: only {ONLY_IN[project]} imports {project}"


def private_names(modules: dict[str, Module], module: Module) -> Iterator[str]:
    """No name that begins with an underscore is imported from another module, or read from it."""
    own_modules = {found.alias for found, reached in own_imports(modules, module) if reached.endswith(found.alias)}
    for found, reached in own_imports(modules, module):
        if is_private(found.name) or any(map(is_private, reached.split("."))):
            yield f"{module.name}:{found.line}: {found.name or reached} is private to {reached}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in own_modules:
            yield f"{module.name}:{node.lineno}: {ast.unparse(node)} is private to its module"


def private_attributes(modules: dict[str, Module], module: Module) -> Iterator[str]:
    """No private attribute of another module's objects is read or written."""
    others = {name for other in modules.values() if other is not module for name in other.private_definitions}
    for node in ast.walk(module.tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in others - module.private_definitions
            and ast.unparse(node.value) not in SELF
        ):
            yield f"{module.name}:{node.lineno}: {ast.unparse(node)} is private to another module"


def classes_of_states(modules: dict[str, Module], module: Module) -> Iterator[str]:
    """Nobody asks an object of `pca/` what class it has: the protocol answers."""
    classes = {name for other in modules.values() if other.part == "pca" for name in other.classes}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            if asked & classes:
                yield f"{module.name}:{node.lineno}: {ast.unparse(node)} asks a state what class it has"


def methods(modules: dict[str, Module], module: Module) -> Iterator[str]:
    """No code compares with a method's name: what a method needs stands in its row."""
    if module.name == "methods":
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Compare):
            names = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & METHODS.keys()
            others = [side for side in (node.left, *node.comparators) if not isinstance(side, ast.Constant)]
            if names and any("method" in ast.unparse(side) for side in others):
                yield f"{module.name}:{node.lineno}: {ast.unparse(node)} is for a row of methods.py to say"
        elif isinstance(node, ast.Match) and "method" in ast.unparse(node.subject):
            yield f"{module.name}:{node.lineno}: match {ast.unparse(node.subject)} is for a row of methods.py to say"


def domains(modules: dict[str, Module], module: Module) -> Iterator[str]:
    """Training, comparing and the command line name no domain."""
    if module.part not in ("training", "compare", "cli"):
        return
    names = {name.split(".")[1] for name, other in modules.items() if name.startswith("tasks.") and other.is_package}
    for found, reached in own_imports(modules, module):
        if reached.startswith("tasks.") and reached.split(".")[1] in names:
            yield f"{module.name}:{found.line}: names the domain {reached.split('.')[1]}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
            yield f"{module.name}:{node.lineno}: names the domain {node.value}"


def commands(modules: dict[str, Module], module: Module) -> Iterator[str]:
    """A command has its texts, its options, and one short function that calls the library and prints."""
    if module.part != "cli" or module.is_package or module.name in ("cli.main", "cli.options"):
        return
    functions = [node.name for node in module.tree.body if isinstance(node, ast.FunctionDef)]
    helpers = [name for name in functions if name not in ("add_arguments", "run")]
    constants = [
        target.id
        for node in module.tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    if missing := {"add_arguments", "run"} - set(functions) | COMMAND_CONSTANTS - set(constants):
        yield f"{module.name}: a command has {', '.join(sorted(missing))}"
    if more := set(constants) - COMMAND_CONSTANTS:
        yield f"{module.name}: {', '.join(sorted(more))} belongs into the library"
    if len(helpers) > MAX_COMMAND_HELPERS:
        yield f"{module.name}: {len(helpers)} helpers are logic"
    if (lines := len(module.text.splitlines())) > MAX_COMMAND_LINES:
        yield f"{module.name}: {lines} lines are logic"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef | ast.While | ast.AugAssign | ast.Lambda):
            yield f"{module.name}:{node.lineno}: {type(node).__name__} is logic"


def circles(modules: dict[str, Module]) -> list[str]:
    """No module imports itself through others, and neither does a part in the table."""
    graphs: dict[str, dict[str, set[str]]] = {
        "parts": {part: set(allowed) for part, allowed in PARTS.items()},
        "modules": {
            name: {reached for found, reached in own_imports(modules, module) if not found.typing_only} - {name, ""}
            for name, module in modules.items()
            if name
        },
    }
    broken = []
    for kind, graph in graphs.items():
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            broken.append(f"a circle of {kind}: {' ← '.join(error.args[1])}")
    return broken


def too_long(sources: Path) -> list[str]:
    """No source file and no test is longer than a reader's patience."""
    paths = [path for folder in (sources, sources.parent / "tests") for path in sorted(folder.rglob("*.py"))]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return [f"{path}: {length} lines" for path, length in lengths.items() if length > MAX_LINES]


def test_the_code_keeps_its_layout():
    broken = broken_rules(SOURCES)
    assert not broken, "\n" + "\n".join(broken)


COMMAND = """SUMMARY = USAGE = DESCRIPTION = EXAMPLES = ""
def add_arguments(parser): ...
def run(args): ...
"""
SMALL_PROJECT = {
    "__init__": "from evatune.activations import measure",
    "errors": "class EvaError(ValueError): ...",
    "settings/__init__": "from evatune.errors import EvaError",
    "methods": "def parse(name): return name == 'pissa' or method == 'eva'",
    "pca/__init__": "",
    "pca/exact": "import torch\nclass ExactState:\n    def _look(self): self._values = self._look()",
    "activations/__init__": "from evatune.activations.measure import measure",
    "activations/run": "import math\nfrom evatune.pca.exact import ExactState",
    "activations/layers/linear": "from evatune.activations.run import x",
    "activations/measure": "from evatune.activations.layers import linear\nfrom evatune.spectra import Spectra",
    "spectra": "import typing\nif typing.TYPE_CHECKING:\n    from evatune.allocation import plan",
    "allocation": "import numpy",
    "adapters/__init__": "import peft\nfrom evatune.activations import measure",
    "tasks/__init__": "",
    "tasks/understanding/__init__": "from ..generation import Example",
    "tasks/generation/__init__": "class Example: ...",
    "training/run": "from evatune import __version__, tasks\nfrom evatune.adapters import x",
    "cli/plan": COMMAND,
}
"""Code that keeps every rule."""


@pytest.fixture
def broken_by(tmp_path):
    """Return a function that adds files to the small project and returns the rules that it breaks then."""

    def build(**files: str) -> list[str]:
        for name, text in (SMALL_PROJECT | files).items():
            path = tmp_path / "src" / "evatune" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return broken_rules(tmp_path / "src")

    return build


def test_code_that_keeps_the_rules_breaks_none(broken_by):
    assert broken_by() == []


BREAKS = {
    "an arrow up": ("spectra", "from evatune.report import page", "spectra may not import report"),
    "an arrow up, in a function": ("spectra", "def f():\n    import evatune.report.page", "may not import report.page"),
    "an arrow up, relative": ("activations/run", "from ..spectra import Spectra", "activations may not import spectra"),
    "an arrow up, for a type": (
        "allocation",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from evatune.spectra import Spectra",
        "allocation:3: allocation may not import spectra",
    ),
    "the whole package": ("adapters/lora", "import evatune", "adapters may not import evatune"),
    "a name of the whole package": ("tasks/task", "from evatune import Spectra", "tasks may not import evatune"),
    "the core imports a layer type": (
        "activations/capture",
        "from evatune.activations.layers.linear import LINEAR",
        "activations may not import activations.layers.linear",
    ),
    "no part": ("attic", "x = 1", "attic: is in no part"),
    "a library of the core": ("activations/rows", "import tqdm", "activations may not import tqdm"),
    "a library of pca": ("pca/sketch", "import numpy.linalg", "pca may not import numpy"),
    "peft outside adapters": ("training/setup", "from peft import LoraConfig", "only adapters imports peft"),
    "a private name": ("pca/sketch", "from evatune.pca.exact import _gram", "_gram is private to pca.exact"),
    "a name of a private module": ("pca/sketch", "from evatune.pca._c import f", "f is private to pca._c"),
    "a private name of a module": (
        "pca/sketch",
        "from evatune.pca import exact\nexact._gram()",
        "exact._gram is private to its module",
    ),
    "a private attribute": ("pca/sketch", "def f(state): return state._values", "state._values is private to another"),
    "a private method": ("activations/capture", "def f(state): state._look()", "state._look is private to another"),
    "the class of a state": ("pca/merge", "def f(s): return isinstance(s, ExactState | int)", "asks a state what"),
    "a method's name": ("training/run", "def f(method): return method.name == 'eva'", "is for a row of methods.py"),
    "methods' names": ("adapters/x", "def f(c): return c.method in ('x', 'boft')", "is for a row of methods.py"),
    "a match on a method": ("adapters/x", "match method:\n    case 'eva': ...", "is for a row of methods.py"),
    "training imports a domain": ("training/x", "from evatune.tasks.generation import Example", "names the domain gen"),
    "training names a domain": ("training/x", "home = 'understanding'", "names the domain understanding"),
    "a command names a domain": ("cli/plan", COMMAND + "def f(): return 'generation'", "names the domain generation"),
    "a command with a class": ("cli/plan", COMMAND + "class A: ...", "cli.plan:4: ClassDef is logic"),
    "a command with helpers": ("cli/plan", COMMAND + "def a(): ...\n" * 4, "cli.plan: 4 helpers are logic"),
    "a long command": ("cli/plan", COMMAND + "# a step\n" * 150, "cli.plan: 153 lines are logic"),
    "a command with a table": ("cli/plan", COMMAND + "TABLE = {}", "cli.plan: TABLE belongs into the library"),
    "a command without texts": ("cli/plan", COMMAND.replace("USAGE = ", ""), "cli.plan: a command has USAGE"),
    "a circle": (
        "activations/rows",
        "def f():\n    from evatune.activations import run",
        "a circle of modules: activations.r",
    ),
    "a long module": ("pca/sketch", "x = 1\n" * 501, "sketch.py: 501 lines"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_every_rule_can_fail(broken_by, broken):
    file, text, message = BREAKS[broken]
    files = {file: text}
    if broken == "a circle":
        files["activations/run"] = "from evatune.activations.rows import f"
    if broken == "a name of a private module":
        files["pca/_c"] = ""
    lines = broken_by(**files)
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_a_circle_in_the_table_of_parts_is_seen(broken_by, monkeypatch):
    monkeypatch.setitem(PARTS, "errors", ("settings",))
    assert [line for line in broken_by() if "a circle of parts" in line]
