"""No kernel is used before it has proved itself: once loaded, it runs on a small input whose result is known.

What this finds is not a wrong formula, for which the tests are, but a kernel in a wrong context, parameters in another
order than before (another JAX), or a GPU that computes something else. y, s and dweight must be equal bit for bit, for
an rstd within 4 ULP, all that the approximations of a division and a root may be off; dx lies within the bound of its
two roundings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pallas_norm.kernels.dweight_sum import TILE

from ..programs import Program
from . import arguments, proof_of_forms, trial
from .driver import Unavailable
from .kernels import Kernel
from .trial import ROUNDINGS, Tensor, Verdict


def prove(kernel: Kernel, program: Program) -> None:
    """Raises Unavailable where the kernel does not compute what it should. Waits for its own stream only."""
    device = torch.device("cuda", kernel.device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.no_grad():
        try:
            verdict = CHECKS[program.kind](kernel, program, device, stream.cuda_stream)
        except RuntimeError as error:
            raise Unavailable(f"{kernel.name} is not used on {device}: its trial run failed ({error})") from error
    if wrong := [name for name, right in verdict.items() if not right]:
        raise Unavailable(
            f"{kernel.name} is not used on {device}: in its trial run {' and '.join(wrong)} came out wrong; "
            "report it with the output of python -m pallas_norm"
        )


def _forward(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    _, operands, results = trial.launched(kernel, program, device, stream)
    s, scale = trial.sum_of(operands), trial.scale(operands, program)
    y, found = results["y"].cpu(), results["rstd"].cpu() if "rstd" in results else None

    def right(rstd: Tensor) -> Tensor:
        same = (trial.y(s, rstd, scale, program) == y).all(-1)
        return same if found is None else same & (found == rstd[:, 0])

    verdict = {"y": trial.right_for_some(trial.rstd(s, program.spec), right)}
    if "s" in results:
        verdict["s"] = trial.same(results["s"].cpu(), s.to(results["s"].dtype))
    return verdict


def _gradients(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    plan, operands, results = trial.launched(kernel, program, device, stream)
    dtype, unit_dtype = operands["x"].dtype, trial.torch_dtype(program.rounding.unit.name)
    rstd = operands["rstd"].double()[:, None]
    unit, scale = operands["x"].double() * rstd, trial.scale(operands, program)
    g = operands["dy"].float() if scale is None else operands["dy"].float() * scale
    g = g.to(unit_dtype).double()
    ds = operands["ds"].double() if "ds" in operands else torch.zeros(())
    dx, bound = trial.gradient(g, operands["x"].double(), rstd, plan, dtype, ds)
    verdict: Verdict = {}
    for name in ("dx", "dresidual"):
        if name in results:
            narrowed = ROUNDINGS[results[name].dtype] * (dx.abs() + ds.abs() + bound)
            allowed = bound if results[name].dtype == dtype else bound + narrowed
            verdict[name] = bool(((results[name].cpu().double() - (dx + ds)).abs() <= allowed).all())
    if "dweight" in results:
        parts = results["dweight"].cpu().double()
        verdict["dweight"] = torch.equal(parts.sum(0), (operands["dy"].double() * unit).sum(0))
    return verdict


def _column_sum(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    count = TILE + 5
    row, column = trial.indices(2 * TILE, program.n)
    parts = ((row + column) % 3).float()
    expected = parts[:count].sum(0).to(trial.torch_dtype(program.dweight_dtype))
    parts[count:] = torch.nan  # which it may read and must leave out
    dweight = torch.full_like(expected, torch.nan).to(device)
    arrays = {"parts": parts.to(device), "dweight": dweight}  # kept until the launch: an address keeps nothing alive
    kernel.launch(stream, kernel.recorded.grid, arguments.values(program, arrays, {"rows": count}))
    return {"dweight": trial.same(dweight.cpu(), expected)}


Check = Callable[[Kernel, Program, torch.device, int], Verdict]
CHECKS: dict[str, Check] = {
    "forward": _forward,
    "backward": _gradients,
    "column_sum": _column_sum,
    **proof_of_forms.CHECKS,
}
