"""Imports run one way: who imports whom, as the sources say it."""

import ast
import sys
from pathlib import Path

import pytest

import cattn

FOLDER = Path(cattn.__file__).parent
# Each part, below those that it stands on: all that it imports of cattn; of others, the standard library apart.
PARTS = {
    "_checks": (set(), {"numpy"}),
    "_layouts": ({"_checks"}, {"numpy"}),
    "reference": ({"_checks", "_layouts"}, {"numpy"}),
    "_kernels": (set(), set()),
    "_threads": ({"_kernels"}, set()),
    "_attention": ({"_checks", "_kernels", "_threads"}, {"numpy"}),
    "_linear": ({"_checks", "_kernels", "_threads"}, {"numpy"}),
    "_serving": ({"_checks", "_kernels", "_attention"}, {"numpy"}),
    "_gradients": ({"_checks", "_kernels", "_attention", "_serving", "reference"}, {"numpy"}),
    "_cache": ({"_checks", "_kernels", "_threads", "_attention"}, {"numpy"}),
    "_merge": ({"_checks", "_kernels", "_threads"}, {"numpy"}),
    "_multihead": ({"_checks", "_kernels", "_threads", "_attention", "_gradients", "_linear", "reference"}, {"numpy"}),
    "_positional": ({"_checks", "_kernels", "reference"}, {"numpy"}),
    "_rotary": ({"_checks", "_kernels", "_threads"}, {"numpy"}),
    "_config": ({"_checks", "_kernels", "_threads", "__init__"}, {"numpy", "threadpoolctl"}),  # late: the version
    "_preload": ({"_kernels", "_threads", "_attention"}, {"numpy"}),
}
ON_TOP = {"__init__", "__main__", "__pyinstaller", "_plain", "_selfcheck", "_speed", "integrations", "plots"}


def imported(path):
    """The full name of each module that a file imports anywhere, or of what it imports from cattn."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"cattn.{alias.name}" if node.module == "cattn" else node.module for alias in node.names)


@pytest.mark.parametrize("part", PARTS)
def test_who_imports_whom(part):
    paths = list((FOLDER / part).glob("*.py")) or [FOLDER / f"{part}.py"]
    names = [f"{name}.__init__".split(".") for path in paths for name in imported(path)]
    of_cattn = {second for first, second, *_ in names if first == "cattn"} - {part}
    others = {first for first, *_ in names} - {"cattn"} - sys.stdlib_module_names
    assert (of_cattn, others) == PARTS[part]
    assert of_cattn - {"__init__"} <= set(list(PARTS)[: list(PARTS).index(part)])


@pytest.mark.parametrize("path", sorted((FOLDER / "integrations").glob("*.py")), ids=lambda path: path.stem)
def test_integrations_import_their_libraries_late(path):
    """None where they are imported, so that each can say what it needs."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [name for node in nodes for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                                                 [alias.name for alias in node.names])]
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names <= {"cattn", "numpy"}


def test_every_part_has_a_place():
    found = {path.stem for path in FOLDER.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found == PARTS.keys() | ON_TOP
