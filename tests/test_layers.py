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
    folders = ("pallas_norm", "interop", "bench", "demo", "tests")
    files = [path for folder in folders for path in (HOME.parent / folder).rglob("*.py")]
    assert set(MODULES.values()) < set(files)
    assert [path for path in files if len(path.read_text().splitlines()) > 300] == []


# What pallas_norm_torch takes of pallas_norm beside its public names: a new name here is a new seam.
SEAM = {
    "_activation": {"ACTIVATIONS"},
    "_api_gated": {"activation_of", "group_of"},
    "_api_quantized": {"BELOW", "group_of", "positive"},
    "_autodiff": {"gradient", "norm"},
    "_compat": {"adopt", "cuda_capabilities", "mosaic_architecture"},
    "_dispatch": {"no_kernel_for"},
    "_doctor": {"REPORT", "SHOWN_LENGTHS", "Line", "attempt", "check_cases"},
    "_golden": {"*"},
    "_selfcheck": {"*"},
    "_dtypes": {"AS_S", "Dtypes", "GradientDtypes"},
    "_spec": {"Spec"},
    "_target": {"assemble_for", "assembled_for_another", "takes", "too_old"},
    "_validate": {"*"},
    "_validate_rope": {"Sizes", "fit", "without_ones"},
    "kernels.backward": {"partial_dweight_rows", "partial_dweights"},
    "kernels.dweight_sum": {"TILE", "column_sum"},
    "kernels.forward": {"forward"},
    "gated_reference": {"Form"},
    "kernels.gated": {"fitted", "forward"},
    "kernels.gated_backward": {"partial_dweights"},
    "kernels.grid": {"COUNTS", "counts_of"},
    "kernels.quantized": {"misfit", "quantized"},
    "kernels.rope": {"NUMBERS", "OF_EACH", "PAIR", "STRIDES", "blocks_of", "programs_of", "rope"},
    "kernels.rope_backward": {"NUMBERS", "partial_dweights", "programs_of"},
    "kernels.launch_arguments": {"ALIGNMENT", "BYTES", "COUNT", "LaunchArguments"},
    "plans.few_rows": {"of"},
    "plans.fitting": {"Misfit", "backward_plan_on", "forward_plan_on"},
    "plans.hardware": {"Gpu", "H200", "generation", "named"},
    "plans.plan": {"BackwardPlan", "Plan", "from_memory", "may_be_in_place"},
    "plans.rope": {"rope_backward_plan_on", "rope_plan_on"},
    "quantized_reference": {"LARGEST", "SCALE_OF_ZEROS"},
}


def taken(text: str) -> set[tuple[str, str]]:
    """(module of pallas_norm, name) of what a file takes from it."""
    found: set[tuple[str, str]] = set()
    modules: dict[str, str] = {}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "pallas_norm":
            base = ".".join((node.module or "").split(".")[1:])
            for alias in node.names:
                whole = f"{base}.{alias.name}" if base else alias.name
                if whole in MODULES:
                    modules[alias.asname or alias.name] = whole
                else:
                    found.add((base, alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found.add((modules[node.value.id], node.attr))
    return found


def test_the_torch_package_takes_what_the_seam_names() -> None:
    files = (HOME.parent / "interop" / "pallas_norm_torch").rglob("*.py")
    used = set().union(*(taken(file.read_text()) for file in files))
    allowed = {(module, name) for module, names in SEAM.items() for name in names}
    assert {(m, n) for m, n in used if (m, n) not in allowed and (m, "*") not in allowed and m} == set()
    unused = {module for module, _ in allowed} - {module for module, _ in used}
    assert unused == set()


def test_a_name_beyond_the_seam_is_found() -> None:
    text = "from pallas_norm.kernels import grid as grids\nfrom pallas_norm._spec import Spec\ngrids.extent(1)"
    assert taken(text) == {("kernels.grid", "extent"), ("_spec", "Spec")}
