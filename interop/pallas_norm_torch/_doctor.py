"""The part of `python -m pallas_norm` for torch: which way a call goes on each device and why, and its bits."""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (operators of torch.ops have no types)

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pallas_norm import _compat, _golden, _selfcheck
from pallas_norm._doctor import REPORT, SHOWN_LENGTHS, Line, attempt, check_cases
from pallas_norm.plans.fitting import Misfit, backward_plan_on

from . import cache, direct, launch, ops
from ._explain import explain

NEEDED_TORCH = (2, 11)
# One row length of each kind of forward kernel, a warp, one warpgroup, several, a cluster, with rows for each schedule.
KERNEL_CASES = tuple(
    case for n in (128, 4096, 16384, 131072) for dtype in _golden.DTYPES for case in _golden.cases(n, dtype)
)


def version() -> Iterator[Line]:
    found = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))
    yield Line("", f"torch {torch.__version__} sees {found or 'no CUDA device'}")
    if tuple(map(int, torch.__version__.split(".")[:2])) < NEEDED_TORCH:
        low = ".".join(map(str, NEEDED_TORCH))
        yield Line(
            "note",
            f"torch {torch.__version__} is older than {low}, the oldest tested",
            f"pip install 'torch>={low}'",
        )


def _ways(device: torch.device) -> Iterator[Line]:
    for n in SHOWN_LENGTHS if device.type == "cuda" else (4096,):
        yield Line("", f"pallas_norm_torch, n = {n} on {device}: {explain(n, torch.bfloat16, device)}")


# --- what may be in the way -------------------------------------------------------------------------------------------


def memory(*, preallocates: bool) -> Iterator[Line]:
    if preallocates and torch.cuda.is_available() and _compat.cuda_capabilities():
        yield Line(
            "note",
            "torch and JAX share a GPU, and JAX takes most of its memory at its first use",
            "set XLA_PYTHON_CLIENT_PREALLOCATE=false in programs that use both",
        )


def disk() -> Iterator[Line]:
    """Whether kernels can be kept for the next process."""
    key, payload = "doctor", b"doctor"
    if cache.store(key, payload) and cache.load(key) == payload:
        os.unlink(cache._path(key))
        return
    yield Line(
        "note",
        f"kernels are not kept in {cache.folder()}, so every process compiles them again",
        "make that folder this user's own, writable by nobody else, or set XDG_CACHE_HOME",
    )


# --- the bits ---------------------------------------------------------------------------------------------------------


def _to_torch(array: _golden.Array, device: torch.device) -> torch.Tensor:
    """A copy. torch knows no bfloat16 of NumPy's."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.copy()).to(device)


def _to_numpy(tensor: torch.Tensor | None) -> _golden.Array:
    assert tensor is not None
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_golden.DTYPES["bfloat16"])
    return tensor.numpy()


def _launches(device: torch.device, n: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    return device.type == "cuda" and direct.unavailable(n, device.index, dtype) is None


def _promised(case: _golden.Case, device: torch.device, *, residual: bool) -> _selfcheck.Bits:
    """The bits of kernels. torch's own statements add in torch's order; on a GPU that has the kernels of shorter rows
    only, they are the backward pass."""
    if not _launches(device, case.n, getattr(torch, case.dtype)):
        return {}
    bits = _golden.bits(case, residual=residual)
    try:
        backward_plan_on(launch.gpu_of(device.index), case.n, case.dtype, residual=residual)
    except Misfit:
        del bits["dx"]
    return bits


def check_case(case: _golden.Case, device: torch.device) -> list[str]:
    """What is wrong with a norm on this device, in sentences: y, y in place, the residual form, the gradients."""
    given = _golden.operands(case)
    tensors = {name: _to_torch(array, device) for name, array in given.items()}
    x, residual, weight, dy, ds = (tensors[name] for name in ("x", "residual", "weight", "dy", "ds"))
    options = _golden.EPS, True, 0.0  # as the operators take them, which also give rstd
    x_leaf, residual_leaf, weight_leaf = (tensor.clone().requires_grad_() for tensor in (x, residual, weight))
    wrong: list[str] = []

    def checked(name: str, outputs: dict[str, Any]) -> None:
        arrays = {name: _to_numpy(tensor) for name, tensor in outputs.items()}
        sentences = _selfcheck.check(given, arrays, bits=_promised(case, device, residual="s" in outputs))
        wrong.extend(f"{name}, {case}: {sentence}" for sentence in sentences)

    y, rstd = torch.ops.pallas_norm.rms_norm(x, weight, *options)
    dx, dweight = torch.autograd.grad(ops.rms_norm(x_leaf, weight_leaf, _golden.EPS), (x_leaf, weight_leaf), dy)
    checked("rms_norm", {"y": y, "rstd": rstd, "dx": dx, "dweight": dweight})

    again, in_place = ops.rms_norm(x, weight, _golden.EPS), x.clone()
    ops.rms_norm(in_place, weight, _golden.EPS, out=in_place)
    bits = _promised(case, device, residual=False)
    for name, tensor in (("rms_norm", again), ("rms_norm in place", in_place)):
        found = _selfcheck.check_y(_to_numpy(tensor), given["x"], given["weight"], _to_numpy(rstd), bits)
        wrong.extend(f"{name}, {case}: {sentence}" for sentence in found)

    y, s, rstd = torch.ops.pallas_norm.add_rms_norm(x, residual, weight, *options)
    results = ops.add_rms_norm(x_leaf, residual_leaf, weight_leaf, _golden.EPS)
    dx, dweight = torch.autograd.grad(results, (x_leaf, weight_leaf), (dy, ds))
    checked("add_rms_norm", {"y": y, "s": s, "rstd": rstd, "dx": dx, "dweight": dweight})
    return wrong


def self_check(device: torch.device) -> Iterator[Line]:
    launches = _launches(device, 4096)

    def what(case: _golden.Case) -> str:
        if not _launches(device, case.n, getattr(torch, case.dtype)):
            return "torch's own statements in torch's order"
        return f"direct launch ({_selfcheck.kind_of(case, launch.gpu_of(device.index))})"

    before = list(_ways(device))
    yield from before
    cases = KERNEL_CASES if launches else _selfcheck.XLA_CASES
    yield from check_cases(f"torch on {device}", cases, functools.partial(check_case, device=device), what, REPORT)
    # A kernel that is not what the launch expects is found out at its first call, which then goes the other way.
    changed = (line for line, known in zip(_ways(device), before, strict=True) if line != known)
    yield from (Line("note", f"{line.text} (found out by the check)", REPORT) for line in changed)


def examine(*, preallocates: bool) -> Iterator[Line]:
    """The lines about torch: of the CPU and of the first CUDA device."""
    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    yield from attempt("torch", version)
    yield from attempt("memory", functools.partial(memory, preallocates=preallocates))
    if any(_launches(device, 4096) for device in devices):
        yield from attempt("disk cache", disk)
    for device in devices:
        yield from attempt(f"torch on {device}", functools.partial(self_check, device))
