"""No kernel is used before it has proved itself: once loaded, it runs on a small input whose result is known.

What this finds is not a wrong formula, for which the tests are, but a kernel in a wrong context, parameters in another
order than before (another JAX), or a GPU that computes something else. y, s and dweight must be equal bit for bit, for
an rstd within 4 ULP, all that the approximations of a division and a root may be off; dx lies within the bound of its
two roundings.

What is expected is computed on the CPU: torch would load a dozen kernels of its own for it, 0.2 s in a fresh process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pallas_norm.kernels import backward as backward_kernel
from pallas_norm.kernels.dweight_sum import TILE
from pallas_norm.plans.plan import BackwardPlan, Plan

from .. import quantized_statements, rows
from ..programs import Program
from . import arguments
from .driver import Unavailable
from .kernels import Kernel

Tensor = torch.Tensor
Arrays = Mapping[str, Tensor]
Verdict = dict[str, bool]  # by result, whether it is right
RSTD_ULP = 4
ROUNDINGS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-22}  # two, relative


def prove(kernel: Kernel, program: Program) -> None:
    """Raises Unavailable where the kernel does not compute what it should. Waits for its own stream only."""
    device = torch.device("cuda", kernel.device)
    check: Callable[[Kernel, Program, torch.device, int], Verdict]
    checks = {"forward": _forward, "quantized": _quantized, "backward": _gradients, "column_sum": _column_sum}
    check = checks[program.kind]
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.no_grad():
        try:
            verdict = check(kernel, program, device, stream.cuda_stream)
        except RuntimeError as error:
            raise Unavailable(f"{kernel.name} is not used on {device}: its trial run failed ({error})") from error
    if wrong := [name for name, right in verdict.items() if not right]:
        raise Unavailable(
            f"{kernel.name} is not used on {device}: in its trial run {' and '.join(wrong)} came out wrong; "
            "report it with the output of python -m pallas_norm"
        )


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _indices(count: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count, dtype=torch.int32)[:, None], torch.arange(n, dtype=torch.int32)[None]


def _count(plan: Plan) -> int:
    """Two full blocks, and where a block has several rows one row that fills none."""
    return 2 * plan.block + (plan.block > 1)


def _operands(program: Program, count: int) -> dict[str, Tensor]:
    """Small whole numbers and halves, whose squares and products have exact sums in any order; no two rows alike."""
    row, column = _indices(count, program.n)
    values = {
        "x": lambda: (1 + (row + column) % 2) * (1 - 2 * ((5 * row + 3 * column + column // 32) % 3 == 0).int()),
        "residual": lambda: (row + 2 * column) % 3 - 1,
        "dy": lambda: 1 - 2 * ((row + column // 2) % 2),
        "ds": lambda: (row + column) % 4 - 1,
        "rstd": lambda: 0.5 + 0.5 * (row[:, 0] % 2),
        "weight": lambda: 1 + (column[0] % 4) / 4,
        "scale": lambda: torch.full((1,), 0.0625),
    }
    return {name: values[name]().to(_dtype(dtype)) for name, dtype in program.dtypes}


def _y(s: Tensor, rstd: Tensor, scale: Tensor | None, program: Program) -> Tensor:
    """For that rstd."""
    unit = (s * rstd).to(_dtype(program.rounding.unit.name)).float()
    return (unit if scale is None else unit * scale).to(_dtype(program.rounding.y.name))


def _results(program: Program, count: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:
    """What the kernel writes: NaN before, so that nothing is right that was not written."""
    n = program.n
    # Not more parts than are written: the sum wants a tile, whose filling torch spreads over threads, 5 ms where
    # other processes keep the cores.
    shapes = {"rstd": (count,), "dweight": (_parts(plan, count), n)}
    return {
        name: torch.full(shapes.get(name, (count, n)), torch.nan, dtype=_dtype(program.result_dtype(name))).to(device)
        for name in program.outputs
    }


def _parts(plan: Plan, count: int) -> int:
    return backward_kernel.partial_dweight_rows(plan, count) if isinstance(plan, BackwardPlan) else 0


def _launch(
    kernel: Kernel, program: Program, plan: Plan, stream: int, arrays: Arrays, numbers: Mapping[str, int]
) -> None:
    count = arrays["x"].shape[0]
    values = arguments.values(program, arrays, arguments.counts(plan, count) | dict(numbers))
    kernel.launch(stream, arguments.grid(plan, count), values)


def _same(found: Tensor, expected: Tensor) -> bool:
    as_bits = torch.int16 if found.element_size() == 2 else torch.int32
    return torch.equal(found.view(as_bits), expected.view(as_bits))


def _scale(operands: Arrays, program: Program) -> Tensor | None:
    weight, offset, rounded = operands.get("weight"), program.spec.weight_offset, program.rounding.weight
    if weight is None or rounded is None:
        return None
    wide = weight.to(_dtype(rounded.name)).float()
    return wide + offset if offset else wide


def _on_device(operands: Arrays, program: Program, plan: Plan, device: torch.device) -> dict[str, Tensor]:
    """The operands; with strides, in rows that are wider than they."""
    if not program.strided:
        return {name: tensor.to(device) for name, tensor in operands.items()}
    placed: dict[str, Tensor] = {}
    for name, tensor in operands.items():
        if name in ("x", "residual"):
            tensor = torch.nn.functional.pad(tensor, (0, rows.ALIGNMENT))
        placed[name] = tensor.to(device)[..., : program.n]
    return placed


def _forward(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    plan, spec, n = program.plan, program.spec, program.n
    assert plan is not None
    count = _count(plan)
    operands, results = _operands(program, count), _results(program, count, plan, device)
    arrays = {**_on_device(operands, program, plan, device), **results}
    numbers: Mapping[str, int] = {}
    if program.strided:
        places = rows.strided({name: arrays[name] for name in ("x", "residual") if name in operands}, vec=plan.vec)
        assert places is not None
        numbers = arguments.strides(places, arrays)
    _launch(kernel, program, plan, stream, arrays, numbers)

    dtype, unit_dtype = (_dtype(one.name) for one in (program.rounding.s, program.rounding.unit))
    s = operands["x"].float() + (operands["residual"].float() if "residual" in operands else 0.0)
    rstd = torch.rsqrt(s.square().sum(-1, keepdim=True) / n + spec.eps)
    scale = _scale(operands, program)
    y, found = results["y"].cpu(), results["rstd"].cpu() if "rstd" in results else None
    left = torch.ones(count, dtype=torch.bool)  # rows that are not right for any rstd yet
    for ulp in sorted(range(-RSTD_ULP, RSTD_ULP + 1), key=abs):
        near = (rstd.view(torch.int32) + ulp).view(torch.float32)
        unit = (s * near).to(unit_dtype).float()
        expected = (unit if scale is None else unit * scale).to(y.dtype)
        right = (expected == y).all(-1)
        if found is not None:
            right &= found == near[:, 0]
        left &= ~right
        if not left.any():
            break
    verdict = {"y": not left.any()}
    if "s" in results:
        verdict["s"] = _same(results["s"].cpu(), s.to(dtype))
    return verdict


def _quantized(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    """q and scales, of y for an rstd that is near. Nothing of -128 was written."""
    plan, spec, n = program.plan, program.spec, program.n
    assert plan is not None
    count, dtype = _count(plan), _dtype(program.q_dtype)
    operands = _operands(program, count)
    shapes = {"scales": (count, n // (program.group or n))}
    kinds = {
        "q": torch.int8,
        "scales": torch.float32,
        **{name: _dtype(getattr(program.rounding, name).name) for name in ("s", "y")},
    }
    results = {
        name: torch.full(shapes.get(name, (count, n)), -128, dtype=kinds[name]).to(device) for name in program.outputs
    }
    _launch(kernel, program, plan, stream, {**_on_device(operands, program, plan, device), **results}, {})

    found = {name: value.cpu() for name, value in results.items()}
    s = operands["x"].float() + (operands["residual"].float() if "residual" in operands else 0.0)
    rstd, scale = torch.rsqrt(s.square().sum(-1, keepdim=True) / n + spec.eps), _scale(operands, program)
    left = torch.ones(count, dtype=torch.bool)
    for ulp in sorted(range(-RSTD_ULP, RSTD_ULP + 1), key=abs):
        y = _y(s, (rstd.view(torch.int32) + ulp).view(torch.float32), scale, program)
        scales = quantized_statements.scale_of(y, dtype, program.group) if program.group else operands["scale"][0]
        expected = {"q": quantized_statements.by_scale(y, scales, dtype).view(torch.int8), "scales": scales, "y": y}
        right = [(found[name] == expected[name]).all(-1) for name in ("q", "scales", "y") if name in found]
        left &= ~torch.stack(right).all(0)
        if not left.any():
            break
    verdict = {"q": not left.any()}
    if "s" in found:
        verdict["s"] = _same(found["s"], s.to(found["s"].dtype))
    return verdict


def _gradients(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    plan, n = program.plan, program.n
    assert plan is not None
    count = _count(plan)
    operands, results = _operands(program, count), _results(program, count, plan, device)
    _launch(kernel, program, plan, stream, {**_on_device(operands, program, plan, device), **results}, {})

    dtype, unit_dtype = operands["x"].dtype, _dtype(program.rounding.unit.name)
    rstd = operands["rstd"].double()[:, None]
    unit, scale = operands["x"].double() * rstd, _scale(operands, program)
    g = operands["dy"].float() if scale is None else operands["dy"].float() * scale
    g = g.to(unit_dtype).double()
    products = g * unit
    dx = rstd * (g - unit * (products.sum(-1, keepdim=True) / n))
    spread = products.abs().sum(-1, keepdim=True) / n
    bound = 2.0**-24 * rstd * ((plan.depth + 16) * unit.abs() * spread + 8 * g.abs())
    ds = operands["ds"].double() if "ds" in operands else torch.zeros(())
    bound += ROUNDINGS[dtype] * ((dx + ds).abs() + bound + ds.abs())
    verdict: Verdict = {}
    for name in ("dx", "dresidual"):
        if name in results:
            narrowed = ROUNDINGS[results[name].dtype] * (dx.abs() + ds.abs() + bound)
            allowed = bound if results[name].dtype == dtype else bound + narrowed
            verdict[name] = bool(((results[name].cpu().double() - (dx + ds)).abs() <= allowed).all())
    if "dweight" in results:
        parts = results["dweight"][: _parts(plan, count)].cpu().double()
        verdict["dweight"] = torch.equal(parts.sum(0), (operands["dy"].double() * unit).sum(0))
    return verdict


def _column_sum(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    count = TILE + 5
    row, column = _indices(2 * TILE, program.n)
    parts = ((row + column) % 3).float()
    expected = parts[:count].sum(0).to(_dtype(program.dweight_dtype))
    parts[count:] = torch.nan  # which it may read and must leave out
    dweight = torch.full_like(expected, torch.nan).to(device)
    values = arguments.values(program, {"parts": parts.to(device), "dweight": dweight}, {"rows": count})
    kernel.launch(stream, kernel.recorded.grid, values)
    return {"dweight": _same(dweight.cpu(), expected)}
