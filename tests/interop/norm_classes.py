"""The RMSNorm classes of the installed transformers, instances of them, and their own forwards as the oracle.

The oracle is bit for bit, and rstd is free: torch adds in another order and has another rsqrt. A row must be what the
class's own forward gives for some rstd within the bound.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import inspect
import pathlib
import sys
import types
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pallas_norm_torch import _classes, _computation, huggingface
from pallas_norm_torch._classes import ROWS, Kind
from tests import oracle
from tests.interop.rstd import bits, rstd_moved

N = 64  # a power of two: the mean of an exact sum is exact
ROWS_OF_X = 24
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SAME = ((BF16, BF16), (F16, F16), (F32, F32))
MIXED = ((BF16, F32), (F32, BF16), (F16, BF16), (F32, F16))
HANDLED = [digest for digest, row in ROWS.items() if row.forward is not None]

# Constructor arguments that change what a forward computes, beside the defaults.
VARIANTS: dict[Kind, tuple[dict[str, Any], ...]] = {
    Kind.POW: ({}, {"with_scale": False}),
    Kind.GROUPED: ({}, {"group_size": N // 4}),
    Kind.BIASED: ({}, {"use_bias": True}, {"use_weight": False}),
    Kind.GATED_GROUPS: ({"n_groups": 2}, {"n_groups": 2, "norm_before_gate": False}),
}


# --- the classes of the installed transformers ------------------------------------------------------------------------


@functools.cache
def script() -> Any:
    path = pathlib.Path(__file__).parents[2] / "scripts" / "classify-norms"
    loader = SourceFileLoader("classify_norms", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def found() -> tuple[Any, ...]:
    """With the garbage collector paused: it would look at millions of nodes again and again, half of the time."""
    gc.disable()
    try:
        return tuple(script().classes(script().installed()))
    finally:
        gc.enable()


def imported(one: Any) -> type[nn.Module] | None:
    """None where the file needs a package that is not installed."""
    try:
        module = importlib.import_module("transformers." + ".".join(one.path.with_suffix("").parts))
    except ImportError:
        return None
    return getattr(module, one.name)


def loaded(ones: list[Any]) -> list[type[nn.Module]]:
    """At least one; else the test is skipped, which says why."""
    if not ones:
        pytest.skip("a row of another transformers: the installed one has no such class")
    classes = [owner for one in ones if (owner := imported(one)) is not None]
    if not classes:
        pytest.skip(f"{ones[0].path} needs a package that is not installed")
    return classes


def classes_of(digest: str) -> list[type[nn.Module]]:
    if ROWS[digest].example == "torch.nn.RMSNorm":
        return [nn.RMSNorm]
    return loaded([one for one in found() if one.digest == digest])


# --- an instance, its arguments and its own result --------------------------------------------------------------------


def build(owner: type[nn.Module], dtype: torch.dtype, *, eps: float = 1e-5, **variant: Any) -> nn.Module:
    values = {"hidden_size": N, "dim": N, "num_features": N, "normalized_shape": N, "group_size": N // 4, "eps": eps}
    values["config"] = types.SimpleNamespace(hidden_size=N, eps=eps)
    wanted = inspect.signature(owner).parameters
    arguments = {name: value for name, value in values.items() if name in wanted}
    if "group_size" in wanted and wanted["group_size"].default is None:
        del arguments["group_size"]
    module = owner(**(arguments | variant)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():  # of both signs, hardly two alike
        scale = 2.0 ** torch.randint(-2, 3, parameter.shape, generator=generator)
        parameter.data.copy_((torch.randn(parameter.shape, generator=generator) + 0.5) * scale)
    return module


def inputs(
    owner: type[nn.Module], kind: Kind, dtype: torch.dtype, *, exact: bool
) -> Iterator[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(2)
    x = (3 * torch.randn(ROWS_OF_X, N, generator=generator)).to(dtype)
    if exact:
        x = torch.randint(-4, 5, x.shape, generator=generator).to(dtype)
    gated = "gate" in inspect.signature(owner.forward).parameters
    if not gated or kind in (Kind.GATED_INPUT, Kind.GATED_GROUPS):  # the others' gate is optional in name only
        yield (x,)
    if gated:
        gates = torch.randn(x.shape, generator=generator).to(dtype)
        yield x, gates
        yield x.view(2, -1, N), gates.view(2, -1, N)


def ulps_needed(module: nn.Module, arguments: tuple[torch.Tensor, ...], y: torch.Tensor, most: int) -> int:
    """The smallest |movement of rstd| that explains every row of y, which the replacement gave."""
    groups = getattr(module, "n_groups", None) or N // (getattr(module, "group_size", None) or N)
    unexplained = torch.ones(y.numel() // N * groups, dtype=torch.bool)
    for ulps in range(most + 1):
        for signed in {ulps, -ulps}:
            with rstd_moved(signed):
                expected = module(*arguments)
            assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
            unexplained &= (bits(y) != bits(expected)).view(-1, N // groups).any(-1)
        if not unexplained.any():
            return ulps
    raise AssertionError(
        f"{unexplained.sum()} of {unexplained.numel()} rows of {type(module).__name__} have other roundings"
    )


def compare(owner: type[nn.Module], x_dtype: torch.dtype, weight_dtype: torch.dtype, *, exact: bool) -> None:
    kind = _classes.recognise(owner).kind  # pyright: ignore
    # On exact inputs only rsqrt differs: by at most 3 units between XLA and torch over all mantissas and parities. Not
    # where something inexact is multiplied into x before the norm.
    exact_sum = exact and kind not in (Kind.GATED_INPUT, Kind.GATED_GROUPS, Kind.SCALED_INPUT)
    most = 3 if exact_sum else round(2 * oracle.rstd_bound(N))  # both may be off
    for variant in VARIANTS.get(kind, ({},)):
        module = build(owner, weight_dtype, **variant)
        for arguments in inputs(owner, kind, x_dtype, exact=exact):
            with huggingface.patched(module) as report, torch.no_grad():
                assert report.replaced == {owner.__name__: 1}, str(report)
                y = module(*arguments)
            with torch.no_grad():
                ulps_needed(module, arguments, y, most)


def llama(eps: float = 1e-6) -> nn.Module:
    return build(LlamaRMSNorm, F32, eps=eps)


def gemma() -> nn.Module:
    return build(GemmaRMSNorm, BF16)


def unknown(module: nn.Module) -> str:
    """Why a module is left that no row knows and whose computation is none of ours."""
    reason = _computation.compute(module)
    assert isinstance(reason, str)
    return (
        f"its forward {reason}; if it computes what rms_norm does all the same, say so with "
        f"patch(model, known={{{type(module).__name__}: dict(eps=..., cast_before_scale=...)}}), or make it a "
        "pallas_norm_torch.RMSNorm or a call of rms_norm"
    )
