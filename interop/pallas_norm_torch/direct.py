"""The kernels by direct launch: which one, with which addresses."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from pallas_norm import _backward
from pallas_norm._columns import TILE
from pallas_norm._spec import Spec
from pallas_norm.regimes import LARGEST_N, SMALLEST_N, backward_plan_for

from . import launch, rows
from .launch import NUMBER
from .programs import Program

Tensor = torch.Tensor


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def unavailable(n: int, device: int) -> str | None:
    """Why rows of n elements cannot take the direct launch on this CUDA device, or None."""
    if not SMALLEST_N <= n <= LARGEST_N:
        return f"no kernel for rows of {n} elements: the kernels take {SMALLEST_N} <= n <= {LARGEST_N}"
    return launch.unavailable(device)


@functools.cache
def forward_program(
    n: int, x: torch.dtype, weight: torch.dtype | None, spec: Spec, *, residual: bool, with_rstd: bool, strided: bool
) -> Program:
    dtypes = [("x", dtype_name(x))]
    if residual:
        dtypes.append(("residual", dtype_name(x)))
    if weight is not None:
        dtypes.append(("weight", dtype_name(weight)))
    outputs = ("y", *(["s"] if residual else []), *(["rstd"] if with_rstd else []))
    return Program("forward", n, tuple(dtypes), outputs, spec, strided)


def result_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    spec: Spec,
    *,
    with_rstd: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, s, rstd). `out` receives y: x itself, or memory that no operand shares."""
    n = x.shape[-1]
    weight = None if weight is None else rows.ready(weight)

    def program(*, strided: bool) -> Program:
        dtype = None if weight is None else weight.dtype
        return forward_program(
            n, x.dtype, dtype, spec, residual=residual is not None, with_rstd=with_rstd, strided=strided
        )

    plan = program(strided=False).plan
    assert plan is not None
    given = [tensor for tensor in (x, residual, out) if tensor is not None]
    target = out
    if target is not None and plan.rereads and _shares(target, given[:-1]):
        target = None  # a row is read twice: other warps may still read what this one would write
    strided = any(not tensor.is_contiguous() or not rows.aligned(tensor) for tensor in given)
    if strided and rows.strided(*given, vec=plan.vec) is None:
        x, residual = rows.ready(x), None if residual is None else rows.ready(residual)
        target = target if target is not None and target.is_contiguous() and rows.aligned(target) else None
        strided = False
    y = torch.empty(x.shape, dtype=result_dtype(x, weight), device=x.device) if target is None else target
    s = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if with_rstd else None
    if x.numel():
        count = x.numel() // n
        arrays = {"x": x, "residual": residual, "weight": weight, "y": y, "s": s, "rstd": rstd}
        numbers = {"rows": count}
        if strided:
            numbers |= _strides(arrays, vec=plan.vec)
        _run(program(strided=strided), x.device, arrays, numbers)
    if out is None:
        return y, s, rstd
    if target is None:
        out.copy_(y)
    else:
        torch.autograd.graph.increment_version(out)  # autograd must notice that what it may have saved has changed
    return out, s, rstd


def _shares(out: Tensor, operands: list[Tensor]) -> bool:
    return any(out.untyped_storage().data_ptr() == operand.untyped_storage().data_ptr() for operand in operands)


def _strides(arrays: dict[str, Tensor | None], *, vec: int) -> dict[str, int]:
    """The group and the strides, of everything that has rows of n elements."""
    named = {name: tensor for name in ("x", "residual", "y", "s") if (tensor := arrays[name]) is not None}
    found = rows.strided(*named.values(), vec=vec)
    assert found is not None  # fresh results are contiguous, which fits in with every other
    group, places = found
    numbers = {"group": group}
    for name, place in zip(named, places, strict=True):
        numbers |= {f"{name}_{level}": value for level, value in place._asdict().items()}
    return numbers


def backward(
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    spec: Spec,
    *,
    with_dweight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight in the dtype of the weight)."""
    n, spec = x.shape[-1], dataclasses.replace(spec, eps=0.0)  # rstd has eps in it: one kernel serves every eps
    x, rstd, dy = rows.ready(x), rows.ready(rstd), rows.ready(dy)
    ds, weight = (None if tensor is None else rows.ready(tensor) for tensor in (ds, weight))
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(weight) if with_dweight and weight is not None else None
    count = x.numel() // n
    arrays: dict[str, Tensor | None] = {"x": x, "rstd": rstd, "dy": dy, "weight": weight, "ds": ds, "dx": dx}
    program = _backward_program(
        n,
        x.dtype,
        dy.dtype,
        None if weight is None else weight.dtype,
        spec,
        residual=ds is not None,
        with_dweight=with_dweight,
    )
    if not with_dweight:
        _run(program, x.device, arrays, {"rows": count})
        return dx, None
    assert weight is not None
    plan = backward_plan_for(n, dtype_name(x.dtype), dy_dtype=dtype_name(dy.dtype), residual=ds is not None)
    parts_count = _backward.parts_of(plan, count)
    parts = torch.empty(max(parts_count, TILE), n, dtype=torch.float32, device=x.device)
    _run(program, x.device, arrays | {"dweight": parts}, {"rows": count})
    dweight = torch.empty_like(weight)
    _run(_sum_program(n, weight.dtype), x.device, {"parts": parts, "dweight": dweight}, {"rows": parts_count})
    return dx, dweight


@functools.cache
def _backward_program(
    n: int,
    x: torch.dtype,
    dy: torch.dtype,
    weight: torch.dtype | None,
    spec: Spec,
    *,
    residual: bool,
    with_dweight: bool,
) -> Program:
    dtypes = [("x", dtype_name(x)), ("rstd", "float32"), ("dy", dtype_name(dy))]
    if weight is not None:
        dtypes.append(("weight", dtype_name(weight)))
    if residual:
        dtypes.append(("ds", dtype_name(x)))
    return Program("backward", n, tuple(dtypes), ("dx", *(["dweight"] if with_dweight else [])), spec)


@functools.cache
def _sum_program(n: int, dtype: torch.dtype) -> Program:
    return Program("column_sum", n, (("parts", "float32"),), ("dweight",), Spec(), dweight_dtype=dtype_name(dtype))


def _run(program: Program, device: torch.device, arrays: dict[str, Any], numbers: dict[str, int]) -> None:
    def address(name: str) -> int:
        at = arrays[name].data_ptr()
        return at - numbers.get(f"{name}_offset", 0)

    inputs = [address(name) for name, _ in program.dtypes]
    given = [numbers[name] * NUMBER for name in program.numbers]
    outputs = [address(name) for name in program.outputs]
    assert not any(value % NUMBER for value in (*inputs, *outputs))
    run = launch.kernel(program, device.index)
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            run(torch.cuda.current_stream().cuda_stream, *inputs, *given, *outputs)
        return
    launch.current_context()
    run(torch.cuda.current_stream().cuda_stream, *inputs, *given, *outputs)
