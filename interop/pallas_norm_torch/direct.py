"""The kernels by direct launch: which one, with which addresses."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from pallas_norm import _dispatch  # pyright: ignore[reportPrivateUsage]
from pallas_norm._spec import Spec
from pallas_norm.kernels import backward as backward_kernel
from pallas_norm.kernels import grid
from pallas_norm.kernels.dweight_sum import TILE
from pallas_norm.plans.plan import BackwardPlan, Plan, Source

from . import launch, rows
from ._overlap import may_overlap
from ._validate import dtype_name
from .programs import Program

Tensor = torch.Tensor


_refused: dict[tuple[int, int], str | None] = {}  # by n and device, why, or None; what was found out once


def unavailable(n: int, device: int) -> str | None:
    """Why rows of n elements cannot take the direct launch on this CUDA device, or None."""
    if (n, device) not in _refused:
        _refused[n, device] = _dispatch.no_kernel_for(n) or launch.unavailable(device)
    return _refused[n, device]


def refuse(n: int, device: int, reason: str) -> None:
    """From now on rows of n elements take the other way on this device, for that reason."""
    _refused[n, device] = reason


class Forward(NamedTuple):
    n: int
    x: torch.dtype
    weight: torch.dtype | None
    spec: Spec
    residual: bool
    with_rstd: bool
    strided: bool = False

    def program(self) -> Program:
        dtypes = {"x": self.x, "residual": self.x if self.residual else None, "weight": self.weight}
        outputs = ("y", *(["s"] if self.residual else []), *(["rstd"] if self.with_rstd else []))
        return Program("forward", self.n, _named(dtypes), outputs, self.spec, self.strided)


class Backward(NamedTuple):
    n: int
    x: torch.dtype
    weight: torch.dtype | None
    dy: torch.dtype
    spec: Spec
    residual: bool
    with_dweight: bool

    def program(self) -> Program:
        ds = self.x if self.residual else None
        dtypes = {"x": self.x, "rstd": torch.float32, "dy": self.dy, "weight": self.weight, "ds": ds}
        outputs = ("dx", *(["dweight"] if self.with_dweight else []))
        return Program("backward", self.n, _named(dtypes), outputs, self.spec)


class ColumnSum(NamedTuple):
    n: int
    dweight: torch.dtype

    def program(self) -> Program:
        dtypes = _named({"parts": torch.float32})
        return Program("column_sum", self.n, dtypes, ("dweight",), Spec(), dweight_dtype=dtype_name(self.dweight))


def _named(dtypes: dict[str, torch.dtype | None]) -> tuple[tuple[str, str], ...]:
    return tuple((name, dtype_name(dtype)) for name, dtype in dtypes.items() if dtype is not None)


_programs: dict[tuple[type, Forward | Backward | ColumnSum], Program] = {}  # tuples of two types may be equal


def program_of(kernel: Forward | Backward | ColumnSum) -> Program:
    """The one for each, also where threads race for it."""
    key = type(kernel), kernel
    if (found := _programs.get(key)) is not None:
        return found
    return _programs.setdefault(key, kernel.program())


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
    n, weight = x.shape[-1], None if weight is None else rows.ready(weight)
    kernel = Forward(n, x.dtype, None if weight is None else weight.dtype, spec, residual is not None, with_rstd)
    program = program_of(kernel)
    given = {"x": x, "residual": residual, "y": out}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    target, places = out, None
    if not all(tensor.is_contiguous() and rows.aligned(tensor) for tensor in given.values()):
        assert program.plan is not None
        places = rows.strided(given, vec=program.plan.vec)
        if places is None:
            x, residual = rows.ready(x), None if residual is None else rows.ready(residual)
            target = target if target is not None and target.is_contiguous() and rows.aligned(target) else None
        else:
            program = program_of(kernel._replace(strided=True))
    plan = program.plan
    assert plan is not None
    count = x.numel() // n
    if target is not None and not may_be_in_place(plan, count) and may_overlap(target, x):
        # y is a tensor of its own then, and does not lie where `out` does: with the strides of `out` it was written
        # past its end.
        target = None
        places = None if places is None else places.without("y")
    y = torch.empty(x.shape, dtype=result_dtype(x, weight), device=x.device) if target is None else target
    s = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if with_rstd else None
    if count:
        arrays = {"x": x, "residual": residual, "weight": weight, "y": y, "s": s, "rstd": rstd}
        numbers = _counts(plan, count)
        if places is not None:
            numbers |= _strides(places, arrays)
        _run(program, x.device, arrays, numbers)
    if out is None:
        return y, s, rstd
    if target is None:
        out.copy_(y)
    else:
        torch.autograd.graph.increment_version(out)  # autograd must notice that what it may have saved has changed
    return out, s, rstd


def may_be_in_place(plan: Plan, count: int) -> bool:
    """Whether no warp of a kernel reads a row of `count` that another one may have written.

    Rows that are read twice are such rows, and those that fill no block: every warp holds them, and one may have
    written before another has read. racecheck, which slows warps down, showed the norm of a norm.
    """
    return plan.source is not Source.MEMORY and not count % plan.block


def _counts(plan: Plan, rows: int) -> dict[str, int]:
    return dict(zip(grid.COUNTS, grid.counts_of(plan, rows), strict=True))


def _strides(places: rows.Places, arrays: dict[str, Tensor | None]) -> dict[str, int]:
    """The numbers of a launch on rows that lie at strides: `places` of what was given, and of the fresh results."""
    numbers = {"group": places.group}
    for name in ("x", "residual", "y", "s"):
        if (tensor := arrays[name]) is not None:
            offset, outer, inner = places.of.get(name) or rows.fresh(tensor, places.group)
            numbers |= {f"{name}_offset": offset, f"{name}_outer": outer, f"{name}_inner": inner}
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
    weight_dtype = None if weight is None else weight.dtype
    program = program_of(Backward(n, x.dtype, weight_dtype, dy.dtype, spec, ds is not None, with_dweight))
    plan = program.plan
    assert isinstance(plan, BackwardPlan)
    if not with_dweight:
        _run(program, x.device, arrays, _counts(plan, count))
        return dx, None
    assert weight is not None
    parts_count = backward_kernel.partial_dweight_rows(plan, count)
    # The sum reads whole tiles, and leaves out what no program wrote.
    new = torch.empty if parts_count >= TILE else torch.zeros
    parts = new(max(parts_count, TILE), n, dtype=torch.float32, device=x.device)
    _run(program, x.device, arrays | {"dweight": parts}, _counts(plan, count))
    dweight = torch.empty_like(weight)
    _run(program_of(ColumnSum(n, weight.dtype)), x.device, {"parts": parts, "dweight": dweight}, {"rows": parts_count})
    return dx, dweight


def _run(program: Program, device: torch.device, arrays: dict[str, Any], numbers: dict[str, int]) -> None:
    def address(name: str) -> int:
        at = arrays[name].data_ptr()
        return at - numbers.get(f"{name}_offset", 0)

    inputs = [address(name) for name, _ in program.dtypes]
    given = [numbers[name] * unit for name, unit in program.numbers.items()]
    outputs = [address(name) for name in program.outputs]
    assert not any(value % rows.ALIGNMENT for value in (*inputs, *outputs))
    run, pack = launch.kernel(program, device.index)
    packed = pack(*inputs, *given, *outputs)
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            run(torch.cuda.current_stream().cuda_stream, packed)
        return
    launch.current_context()
    run(torch.cuda.current_stream().cuda_stream, packed)
