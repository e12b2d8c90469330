"""A trial run: operands whose results are known, where they go, and which of the results are right.

What is expected is computed on the CPU: torch would load a dozen kernels of its own for it, 0.2 s in a fresh process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pallas_norm._spec import Spec  # pyright: ignore[reportPrivateUsage]
from pallas_norm.kernels import backward as backward_kernel
from pallas_norm.plans.plan import BackwardPlan, Plan

from .. import rows
from ..programs import Program
from . import arguments
from .kernels import Kernel

Tensor = torch.Tensor
Arrays = Mapping[str, Tensor]
Verdict = dict[str, bool]  # by result, whether it is right
RSTD_ULP = 4
ROUNDINGS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-22}  # two, relative


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def indices(count: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count, dtype=torch.int32)[:, None], torch.arange(n, dtype=torch.int32)[None]


def rows_for(plan: Plan, groups: int = 1) -> int:
    """Two full blocks, and where a block has several rows one row that fills none; of several weights two for each."""
    return (2 * plan.block + (plan.block > 1)) * groups


def operands(program: Program, count: int) -> dict[str, Tensor]:
    """Small whole numbers and halves, whose squares and products have exact sums in any order; no two rows alike."""
    row, column = indices(count, program.n)
    weight_column = torch.arange(program.groups * program.n, dtype=torch.int32)
    values = {
        "gate": lambda: 32 * ((row + column) % 3 > 0).int(),  # of which both activations are exact
        "x": lambda: x_of(row, column),
        "residual": lambda: (row + 2 * column) % 3 - 1,
        "dy": lambda: 1 - 2 * ((row + column // 2) % 2),
        "ds": lambda: (row + column) % 4 - 1,
        "rstd": lambda: 0.5 + 0.5 * (row[:, 0] % 2),
        "weight": lambda: 1 + (weight_column % 4) / 4,
        "scale": lambda: torch.full((1,), 0.0625),
    }
    return {name: values[name]().to(torch_dtype(dtype)) for name, dtype in program.dtypes}


def x_of(row: Tensor, column: Tensor) -> Tensor:
    return (1 + (row + column) % 2) * (1 - 2 * ((5 * row + 3 * column + column // 32) % 3 == 0).int())


def sum_of(operands: Arrays) -> Tensor:
    """x, or x + residual, which is exact: of dtype s wherever it is stored."""
    x = operands["x"].float()
    return x + operands["residual"].float() if "residual" in operands else x


def rstd(s: Tensor, spec: Spec) -> Tensor:
    return torch.rsqrt(s.square().sum(-1, keepdim=True) / s.shape[-1] + spec.eps)


def y(s: Tensor, rstd: Tensor, scale: Tensor | None, program: Program) -> Tensor:
    """For that rstd."""
    unit = (s * rstd).to(torch_dtype(program.rounding.unit.name)).float()
    return (unit if scale is None else unit * scale).to(torch_dtype(program.rounding.y.name))


def results(program: Program, count: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:
    """What the kernel writes: NaN before, so that nothing is right that was not written."""
    n = program.n
    # Not more parts than are written: the sum wants a tile, whose filling torch spreads over threads, 5 ms where
    # other processes keep the cores.
    parts = backward_kernel.partial_dweight_rows(plan, count) if isinstance(plan, BackwardPlan) else 0
    shapes = {"rstd": (count,), "dweight": (parts, n)}
    return {
        name: torch.full(shapes.get(name, (count, n)), torch.nan, dtype=torch_dtype(program.result_dtype(name))).to(
            device
        )
        for name in program.outputs
    }


def launch(
    kernel: Kernel, program: Program, plan: Plan, stream: int, arrays: Arrays, numbers: Mapping[str, int] | None = None
) -> None:
    count = arrays["x"].shape[0]
    values = arguments.values(program, arrays, arguments.counts(plan, count) | dict(numbers or {}))
    kernel.launch(stream, arguments.grid(plan, count), values)


def launched(
    kernel: Kernel, program: Program, device: torch.device, stream: int
) -> tuple[Plan, dict[str, Tensor], dict[str, Tensor]]:
    """The plan, the operands, on the CPU, and what the kernel made of them, on the device."""
    plan = program.plan
    assert plan is not None
    count = rows_for(plan, program.groups)
    given, written = operands(program, count), results(program, count, plan, device)
    launch(kernel, program, plan, stream, *placed(given, program, plan, device, written))
    return plan, given, written


def same(found: Tensor, expected: Tensor) -> bool:
    as_bits = torch.int16 if found.element_size() == 2 else torch.int32
    return torch.equal(found.view(as_bits), expected.view(as_bits))


def scale(operands: Arrays, program: Program) -> Tensor | None:
    weight, offset, rounded = operands.get("weight"), program.spec.weight_offset, program.rounding.weight
    if weight is None or rounded is None:
        return None
    wide = weight.to(torch_dtype(rounded.name)).float()
    return wide + offset if offset else wide


def on_device(operands: Arrays, program: Program, device: torch.device) -> dict[str, Tensor]:
    """The operands; with strides, in rows that are wider than they."""
    if not program.strided:
        return {name: tensor.to(device) for name, tensor in operands.items()}
    placed: dict[str, Tensor] = {}
    for name, tensor in operands.items():
        if name in ("x", "residual", "gate"):
            tensor = torch.nn.functional.pad(tensor, (0, rows.ALIGNMENT))
        placed[name] = tensor.to(device)[..., : program.n]
    return placed


def placed(
    operands: Arrays, program: Program, plan: Plan, device: torch.device, results: Arrays
) -> tuple[dict[str, Tensor], Mapping[str, int]]:
    """All arrays of a forward kernel on the device, and with strides the numbers that tell where they lie."""
    arrays = {**on_device(operands, program, device), **results}
    if not program.strided:
        return arrays, {}
    read = {name: arrays[name] for name in ("x", "residual", "gate") if name in operands}
    places = rows.strided(read, vec=plan.vec)
    assert places is not None
    return arrays, arguments.strides(places, arrays)


def right_for_some(rstd: Tensor, right: Callable[[Tensor], Tensor]) -> bool:
    """Whether each row is right for an rstd that is near."""
    left: Tensor | None = None
    for ulp in sorted(range(-RSTD_ULP, RSTD_ULP + 1), key=abs):
        wrong = ~right((rstd.view(torch.int32) + ulp).view(torch.float32))
        left = wrong if left is None else left & wrong
        if not left.any():
            return True
    return False


NO_DS = torch.zeros(())


def gradient(
    g: Tensor, x: Tensor, rstd: Tensor, plan: Plan, dtype: torch.dtype, ds: Tensor = NO_DS
) -> tuple[Tensor, Tensor]:
    """dx without ds, and how far dx + ds may be off once it was rounded to dtype."""
    unit = x * rstd
    products = g * unit
    dx = rstd * (g - unit * (products.sum(-1, keepdim=True) / plan.n))
    spread = products.abs().sum(-1, keepdim=True) / plan.n
    bound = 2.0**-24 * rstd * ((plan.depth + 16) * unit.abs() * spread + 8 * g.abs())
    return dx, bound + ROUNDINGS[dtype] * ((dx + ds).abs() + bound + ds.abs())
