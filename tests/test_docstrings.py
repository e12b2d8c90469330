"""The docstring of a public function names every parameter, says what is raised and where it comes from, and has an
example, which runs."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

PUBLIC = {
    "pallas_norm": (
        *("rms_norm", "add_rms_norm", "rms_norm_quantized", "add_rms_norm_quantized"),
        *("rms_norm_gated", "rms_norm_rope", "rms_norm_rope_qkv"),
        *("explain", "plan_for", "patch", "unpatch"),
    ),
    "pallas_norm.dlpack": ("rms_norm",),
    "pallas_norm.regimes": ("plan_for", "backward_plan_for"),
    "pallas_norm_torch": (
        *("rms_norm", "add_rms_norm", "RMSNorm", "explain"),
        *("rms_norm_quantized", "add_rms_norm_quantized", "rms_norm_gated", "rms_norm_rope"),
        *("to_jax", "to_torch", "call_jax", "rmsnorm_hf"),
        *("patch", "patched", "unpatch"),
    ),
    "pallas_norm_torch.hub_kernels": ("kernelize", "kernel_mapping"),
    "pallas_norm_torch.sglang": ("fused_add_rmsnorm", "forward_cuda"),
}
QUANTIZED = {"rms_norm_quantized", "add_rms_norm_quantized"}
WITH_SOURCE = QUANTIZED | {
    "rms_norm_gated",
    "rms_norm",
    "add_rms_norm",
    "rms_norm_rope",
    "rms_norm_rope_qkv",
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


# Where an example needs a package that is not here, or a layer of SGLang's.
WITHOUT_EXAMPLE = {"kernelize", "kernel_mapping", "forward_cuda"}
MODULES = [pytest.param(f"pallas_norm.{name}", "RMSNorm", id=name) for name in ("nnx", "linen", "equinox")]


def given(module: str) -> dict[str, Any]:
    """What the names of the examples stand for."""
    of: dict[str, Any] = {"jax": jax, "np": np, "nnx": nnx}
    rng = np.random.default_rng(0)
    shapes = {"q": (4, 32, 64), "k": (4, 8, 64), "qkv": (4, 48, 64), "cos": (4, 64), "sin": (4, 64), "weight": (1024,)}
    shapes |= dict.fromkeys(("x", "residual", "gate"), (4, 1024)) | dict.fromkeys(("q_weight", "k_weight"), (64,))
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if not module.startswith("pallas_norm_torch"):
        of["model"] = nnx.RMSNorm(1024, rngs=nnx.Rngs(0))
        return of | {name: jnp.asarray(value, jnp.bfloat16) for name, value in drawn.items()}
    torch = pytest.importorskip("torch", reason="pallas_norm_torch needs PyTorch, which is not installed")
    of |= {"torch": torch, "model": torch.nn.Sequential(torch.nn.RMSNorm(1024, eps=1e-6))}
    return of | {name: torch.tensor(value, dtype=torch.bfloat16) for name, value in drawn.items()}


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("module", "name"), [param for param in EVERY if param.values[1] not in WITHOUT_EXAMPLE] + MODULES
)
def test_its_example_runs(module: str, name: str) -> None:
    text = inspect.getdoc(function := member(module, name)) or ""
    example = re.search(r"^Example:\n((?:    .*\n?)+)", text, re.MULTILINE)
    assert example is not None
    values = given(module) | {name: function}
    exec(textwrap.dedent(example[1]), values)


@pytest.mark.parametrize("package", ["pallas_norm", "pallas_norm_torch"])
def test_every_function_of_the_package_is_listed_here(package: str) -> None:
    if package == "pallas_norm_torch":
        pytest.importorskip("torch", reason="pallas_norm_torch needs PyTorch, which is not installed")
    members = vars(importlib.import_module(package)).items()
    functions = {name for name, value in members if inspect.isfunction(value) and not name.startswith("_")}
    raise_nothing = {"decompositions", "is_supported_rmsnorm_hf_hidden_size"}
    assert functions - raise_nothing <= set(PUBLIC[package])
