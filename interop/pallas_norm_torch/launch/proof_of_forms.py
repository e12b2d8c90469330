"""The trial runs of other forms than the norm's own: results of 8 bits, rotated heads, gates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pallas_norm.kernels import rope_backward
from pallas_norm.plans.plan import BackwardPlan

from .. import gated_statements, quantized_statements, rope_statements
from ..programs import Program
from . import arguments, trial
from .kernels import Kernel
from .trial import ROUNDINGS, Tensor, Verdict


def _quantized(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    """q and scales, of y for an rstd that is near. Nothing of -128 was written."""
    plan, n = program.plan, program.n
    assert plan is not None
    count, dtype = trial.rows_for(plan), trial.torch_dtype(program.q_dtype)
    operands = trial.operands(program, count)
    shapes = {"scales": (count, n // (program.group or n))}
    kinds = {
        "q": torch.int8,
        "scales": torch.float32,
        **{name: trial.torch_dtype(getattr(program.rounding, name).name) for name in ("s", "y")},
    }
    results = {
        name: torch.full(shapes.get(name, (count, n)), -128, dtype=kinds[name]).to(device) for name in program.outputs
    }
    trial.launch(kernel, program, plan, stream, {**trial.on_device(operands, program, device), **results})

    found = {name: value.cpu() for name, value in results.items()}
    s, scale = trial.sum_of(operands), trial.scale(operands, program)

    def right(rstd: Tensor) -> Tensor:
        y = trial.y(s, rstd, scale, program)
        scales = quantized_statements.scale_of(y, dtype, program.group) if program.group else operands["scale"][0]
        q = quantized_statements.by_scale(y, scales, dtype).view(torch.int8)
        expected = {"q": q, "scales": scales, "y": y}
        same = [(found[name] == expected[name]).all(-1) for name in ("q", "scales", "y") if name in found]
        return torch.stack(same).all(0)

    verdict = {"q": trial.right_for_some(trial.rstd(s, program.spec), right)}
    if "s" in found:
        verdict["s"] = trial.same(found["s"], s.to(found["s"].dtype))
    return verdict


HEADS = {"q": 3, "k": 2}
POSITIONS = 3  # fewer than tokens, so that more than one have the same angles


class Heads(NamedTuple):
    """Heads inside wider tokens, the angles of POSITIONS of these, and weights by name."""

    pair: tuple[Tensor, Tensor]
    angles: tuple[Tensor, Tensor]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, program: Program, tokens: int) -> Heads:
        dtypes, total = dict(program.dtypes), sum(HEADS.values())
        row, column = trial.indices(tokens * total, program.n)
        whole = trial.x_of(row, column).to(trial.torch_dtype(dtypes["q"])).view(tokens, total, program.n)
        cos, sin = ((row + column) % 4 - 1) / 2, ((2 * row + column // 3) % 5 - 2) / 4
        weights = {
            name: (1 + (column[0] + at) % 4 / 4).to(trial.torch_dtype(dtypes[name]))
            for at, name in enumerate(("q_weight", "k_weight"))
            if name in dtypes
        }
        cos, sin = (one[:POSITIONS].to(trial.torch_dtype(dtypes["cos"])) for one in (cos, sin))
        return cls((whole[:, :3], whole[:, 3:]), (cos, sin), weights)

    def on(self, device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The pair inside its tokens, the angles, the weights."""
        whole = torch.cat(self.pair, dim=1).to(device)
        angles, weights = ([one.to(device) for one in some] for some in (self.angles, self.weights.values()))
        return [whole[:, :3], whole[:, 3:]], angles, weights

    def of_tokens(self) -> tuple[Tensor, Tensor]:
        """The angles of each token."""
        cos, sin = (one[torch.arange(len(self.pair[0])) % POSITIONS] for one in self.angles)
        return cos, sin

    def scale(self, name: str, program: Program) -> Tensor | None:
        return trial.scale({"weight": self.weights[f"{name}_weight"]}, program) if self.weights else None


def _rope(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    """For an rstd that is near."""
    plan = program.plan
    assert plan is not None
    heads = Heads.of(program, plan.block + 1)
    y_dtype = trial.torch_dtype(program.rounding.y.name)
    results = [torch.full(x.shape, torch.nan, dtype=y_dtype).to(device) for x in heads.pair]
    pair, angles, weights = heads.on(device)
    kernel.launch(stream, *arguments.of_heads(program, pair, [*angles, *weights], results, POSITIONS))

    cos, sin = heads.of_tokens()
    verdict: Verdict = {}
    for name, x, result in zip(HEADS, heads.pair, results, strict=True):
        s, found, scale = x.float(), result.cpu(), heads.scale(name, program)

        def right(rstd: Tensor, s: Tensor = s, scale: Any = scale, found: Tensor = found) -> Tensor:
            return (rope_statements.rotated(trial.y(s, rstd, scale, program), cos, sin) == found).all(-1)

        verdict[f"{name}_out"] = trial.right_for_some(trial.rstd(s, program.spec), right)
    return verdict


def _rope_gradients(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    """Of gradients whose heads come before their tokens, as attention gives them."""
    plan, n = program.plan, program.n
    assert isinstance(plan, BackwardPlan)
    heads = Heads.of(program, plan.block + 1)
    tokens, dtype = len(heads.pair[0]), trial.torch_dtype(program.rounding.y.name)
    row, column = trial.indices(tokens * sum(HEADS.values()), n)
    dr = (1 - 2 * ((row + column // 2) % 2)).to(dtype).view(-1, tokens, n).transpose(0, 1)
    results = [torch.full(x.shape, torch.nan, dtype=x.dtype).to(device) for x in heads.pair]
    programs = rope_backward.programs_of((tokens * HEADS["q"], tokens * HEADS["k"]), plan)
    if heads.weights:
        results += [torch.full((count, n), torch.nan).to(device) for count in programs]
    pair, angles, weights = heads.on(device)
    whole = dr.to(device)
    given = pair, angles, (whole[:, :3], whole[:, 3:]), weights, results, programs
    kernel.launch(stream, *arguments.of_gradients(program, *given))

    cos, sin = heads.of_tokens()
    unit_dtype = trial.torch_dtype(program.rounding.unit.name)
    verdict: Verdict = {}
    for at, (name, x, of_x) in enumerate(zip(HEADS, heads.pair, (dr[:, :3], dr[:, 3:]), strict=True)):
        dy, scale = rope_statements.rotated_back(of_x, cos, sin), heads.scale(name, program)
        rstd = trial.rstd(x.float(), program.spec).double()
        g = (dy.float() if scale is None else dy.float() * scale).to(unit_dtype).double()
        dx, allowed = trial.gradient(g, x.double(), rstd, plan, x.dtype)
        verdict[f"d{name}"] = bool(((results[at].cpu().double() - dx).abs() <= allowed).all())
        if heads.weights:
            terms = (dy.double() * (x * rstd.float()).to(unit_dtype).double()).flatten(0, -2)
            parts = results[2 + at].cpu().double().sum(0)
            bound = 2 * ROUNDINGS[unit_dtype] * terms.abs().sum(0)
            verdict[f"{name}_dweight"] = bool(((parts - terms.sum(0)).abs() <= bound).all())
    return verdict


def _gated(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    """y and rstd, for an rstd that is near."""
    spec, form = program.spec, program.form
    assert form is not None
    _, operands, results = trial.launched(kernel, program, device, stream)
    x, gate = (operands[name].reshape(-1, program.groups * program.n) for name in ("x", "gate"))
    y, found = results["y"].cpu(), results["rstd"].cpu() if "rstd" in results else None

    def right(rstd: Tensor) -> Tensor:
        expected = gated_statements.of_rstd(x, gate, operands.get("weight"), rstd, spec, form)
        same = (expected.reshape(y.shape) == y).all(-1)
        return same if found is None else same & (found == rstd.reshape(-1))

    return {"y": trial.right_for_some(gated_statements.rstd_of(x, gate, spec, form), right)}


def _gated_gradients(kernel: Kernel, program: Program, device: torch.device, stream: int) -> Verdict:
    form, n = program.form, program.n
    assert form is not None
    plan, operands, results = trial.launched(kernel, program, device, stream)
    x, gate, dy = (operands[name].reshape(-1, program.groups * n) for name in ("x", "gate", "dy"))
    rstd, weight = operands["rstd"].reshape(-1, program.groups), operands.get("weight")
    dx, dgate, _ = gated_statements.backward(x, gate, weight, rstd, dy, program.spec, form, with_dweight=True)
    # Two ways to add up a row of terms of at most 64 * 64 * 2 each, times what they meet: gates and x are 32 and 2.
    largest = 2.0**13 if form.norm_before_gate else 2.0**19
    bound = 2.0**-23 * (plan.depth + 16) * largest
    verdict: Verdict = {}
    for name, expected in (("dx", dx), ("dgate", dgate)):
        allowed = bound + ROUNDINGS[expected.dtype] * expected.double().abs()
        found = results[name].cpu().reshape(expected.shape).double()
        verdict[name] = bool(((found - expected.double()).abs() <= allowed).all())
    if "dweight" in results:
        parts = results["dweight"].cpu().double()
        terms = gated_statements.dweight_terms(x, gate, weight, rstd, dy, program.spec, form).double()
        verdict["dweight"] = torch.equal(parts.reshape(-1, terms.shape[-1]).sum(0), terms.sum(0))
    return verdict


CHECKS = {
    "quantized": _quantized,
    "rope": _rope,
    "rope_backward": _rope_gradients,
    "gated": _gated,
    "gated_backward": _gated_gradients,
}
