"""Imports inside pallas_norm go one way, and none in a circle. docs/architecture.md names every module."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import pallas_norm

HOME = Path(pallas_norm.__file__).parent
MODULES = {".".join(path.relative_to(HOME).with_suffix("").parts): path for path in sorted(HOME.rglob("*.py"))}
LAYERS = ("_api", "_autodiff", "_transforms", "_dispatch", "kernels", "plans")


def imports(module: str, text: str) -> set[str]:
    """The modules of pallas_norm that a module of that name imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        package = module.split(".")[: -node.level]
        base = [*package, *(node.module.split(".") if node.module else [])]
        names = [".".join([*base, alias.name]) for alias in node.names]
        found |= {name if name in MODULES else ".".join(base) for name in names}
    return found & MODULES.keys()


def all_imports() -> dict[str, set[str]]:
    return {name: imports(name, path.read_text()) for name, path in MODULES.items()}


def test_no_module_imports_itself_over_others() -> None:
    graphlib.TopologicalSorter(all_imports()).prepare()  # raises CycleError


def test_a_circle_is_found() -> None:
    circle = all_imports() | {"plans.plan": {"kernels.forward"}}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(circle).prepare()


def test_a_layer_imports_none_above_it() -> None:
    def layer(module: str) -> int | None:
        top = module.split(".")[0]
        return LAYERS.index(top) if top in LAYERS else None

    upward = {
        (name, other)
        for name, others in all_imports().items()
        for other in others
        if (here := layer(name)) is not None and (there := layer(other)) is not None and there < here
    }
    assert upward == set()


def test_the_map_names_every_module() -> None:
    text = (HOME.parent / "docs" / "architecture.md").read_text()
    missing = [name for name in MODULES if not name.endswith("__init__") and f"`{name.replace('.', '/')}`" not in text]
    assert missing == []


def test_no_file_is_too_long_for_one_idea() -> None:
    assert {
        name: length for name, path in MODULES.items() if (length := len(path.read_text().splitlines())) > 300
    } == {}
