"""The docstring of a public function names every parameter, and says what is raised and where it comes from."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

PUBLIC = {
    "pallas_norm": (
        *("rms_norm", "add_rms_norm", "rms_norm_quantized", "add_rms_norm_quantized"),
        *("explain", "plan_for", "patch", "unpatch"),
    ),
    "pallas_norm.dlpack": ("rms_norm",),
    "pallas_norm.regimes": ("plan_for", "backward_plan_for"),
    "pallas_norm_torch": (
        *("rms_norm", "add_rms_norm", "RMSNorm", "explain"),
        *("rms_norm_quantized", "add_rms_norm_quantized"),
        *("to_jax", "to_torch", "call_jax", "rmsnorm_hf"),
        *("patch", "patched", "unpatch"),
    ),
    "pallas_norm_torch.hub_kernels": ("kernelize", "kernel_mapping"),
}
QUANTIZED = {"rms_norm_quantized", "add_rms_norm_quantized"}
WITH_SOURCE = QUANTIZED | {
    "rms_norm",
    "add_rms_norm",
    "RMSNorm",
    "rmsnorm_hf",
    "patch",
    "kernelize",
    "to_jax",
    "to_torch",
}


def member(module: str, name: str) -> Callable[..., Any]:
    if module.startswith("pallas_norm_torch"):
        pytest.importorskip("torch", reason="pallas_norm_torch needs PyTorch, which is not installed")
    return getattr(importlib.import_module(module), name)


EVERY = [pytest.param(module, name, id=f"{module}.{name}") for module, names in PUBLIC.items() for name in names]


@pytest.mark.parametrize(("module", "name"), EVERY)
def test_it_names_every_parameter_and_what_is_raised(module: str, name: str) -> None:
    function = member(module, name)
    text = inspect.getdoc(function) or ""
    parameters = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
    if "those of `patch`" in text:
        parameters = []
    assert [parameter for parameter in parameters if not re.search(rf"\b{parameter}\b", text)] == []
    assert "Raises" in text


@pytest.mark.parametrize(("module", "name"), [param for param in EVERY if param.values[1] in WITH_SOURCE])
def test_it_says_where_it_comes_from(module: str, name: str) -> None:
    assert "Source: " in (inspect.getdoc(member(module, name)) or "")


@pytest.mark.parametrize("package", ["pallas_norm", "pallas_norm_torch"])
def test_every_function_of_the_package_is_listed_here(package: str) -> None:
    if package == "pallas_norm_torch":
        pytest.importorskip("torch", reason="pallas_norm_torch needs PyTorch, which is not installed")
    members = vars(importlib.import_module(package)).items()
    functions = {name for name, value in members if inspect.isfunction(value) and not name.startswith("_")}
    raise_nothing = {"decompositions", "is_supported_rmsnorm_hf_hidden_size"}
    assert functions - raise_nothing <= set(PUBLIC[package])
