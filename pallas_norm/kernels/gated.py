"""The forward kernel of a gated norm: y, and on request rstd.

A row of the kernel is a group of a row of x. Where groups have weights of their own, row r has the (r mod groups)-th.
"""

# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from .._activation import activated
from .._dtypes import Dtypes
from .._spec import Spec
from ..gated_reference import Form, product_dtype
from ..plans.fitting import Misfit
from ..plans.lengths import LARGEST_N
from ..plans.plan import Plan, Regime
from . import activation, launch
from .block import Block, Chunks
from .forward import Out, work
from .pipeline import narrowest, staged
from .rows import Rows
from .weight import Weight

F32 = jnp.float32
NAMES = ("x", "gate")
AnyPlan = TypeVar("AnyPlan", bound=Plan)

Given = dict[str, Chunks]


def fitted(plan: AnyPlan, groups: int) -> AnyPlan:
    """The plan where rows have weights of their own, in turn: each program has rows of one group only, so it keeps that
    group's weight, and adds up that group's dweight. Raises Misfit."""
    if groups == 1:
        return plan
    if plan.regime is Regime.WARP:
        raise Misfit(f"rows of {plan.n} elements share a warpgroup, which keeps one weight, and there are {groups}")
    if groups * plan.n > LARGEST_N or groups > (plan.programs or groups):
        raise Misfit(f"{groups} groups of {plan.n} elements are more than one sum of dweight takes")
    return plan if plan.programs is None else dataclasses.replace(plan, programs=plan.programs // groups * groups)


def in_groups(operands: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The weight as (groups, n), where there are several."""
    n = operands["x"].shape[-1]
    if "weight" not in operands or operands["weight"].shape == (n,):
        return operands
    return operands | {"weight": operands["weight"].reshape(-1, n)}


def activation_of(block: Block, gate: jax.Array, form: Form) -> jax.Array:
    wide = block.widened(gate)
    return activated(wide, activation.sigmoid(wide, block.layout, interpret=block.interpret), form.activation)


def combined(block: Block, given: Given, form: Form) -> Given:
    """Where the gate comes before the norm, the product with it, in float32; else x and the gate as they are."""
    if form.norm_before_gate:
        return given
    gates = (activation_of(block, gate, form) for gate in given["gate"])
    return {"x": [block.widened(x) * a for x, a in zip(given["x"], gates, strict=True)]}


def normalise(
    block: Block, rows: Rows[Given], weight: Weight, out: Out, *, form: Form, dtypes: Dtypes, eps: float
) -> None:
    given = rows.first(block)
    begun = block.begin_sum([block.product(chunk.astype(F32), chunk.astype(F32)) for chunk in given["x"]])
    rows.all_read(block)
    rstd = block.inverse_root(block.end_sum(begun), eps)
    factors, given = weight.factors(block), rows.second(block, given)
    scale, y, gates = block.broadcast(rstd), list[jax.Array](), given.get("gate", [None] * block.plan.chunks)
    for chunk, gate, factor in zip(given["x"], gates, factors, strict=True):
        unit = chunk.astype(F32) * scale
        unit = block.narrowed(unit, dtypes.unit).astype(F32)  # Hugging Face rounds here, before the weight
        v = unit if factor is None else unit * factor
        if gate is not None:  # and here, before the gate
            v = block.narrowed(v, product_dtype(dtypes)).astype(F32) * activation_of(block, gate, form)
        y.append(block.narrowed(v, dtypes.y))
    out.store(block, y, given["x"], rstd)


def forward(
    operands: dict[str, jax.Array], *, plan: Plan, spec: Spec, form: Form, with_rstd: bool, interpret: bool
) -> dict[str, jax.Array]:
    """y, on request rstd; of x and gate (rows, n), and where given weight, (n,) or (groups * n,). `plan` is one that is
    `fitted`. LaunchArguments as of the norm's `forward`."""
    x = operands["x"]
    dtypes = spec.dtypes(x.dtype, weight=operands["weight"].dtype if "weight" in operands else None)
    if interpret:
        plan = launch.interpretable(plan, narrowest(operands, NAMES))
    outputs = {"y": jax.ShapeDtypeStruct(x.shape, dtypes.y)}
    if with_rstd:
        outputs["rstd"] = jax.ShapeDtypeStruct(x.shape[:1], F32)
    inputs, scratch = staged(plan, in_groups(operands), NAMES)
    options: dict[str, Any] = {
        "combined": functools.partial(combined, form=form),
        "normal": functools.partial(normalise, form=form, dtypes=dtypes, eps=spec.eps),
    }
    whole = work(plan, spec, dtypes, NAMES, lambda refs: Out(refs["y"], None, refs.get("rstd")), **options)
    return launch.launch(whole, plan, len(x), inputs, outputs, scratch=scratch, interpret=interpret)
