"""The backward kernel: dx, and each program's part of dweight, which one sum adds up in a fixed order.

The grid is persistent: a program takes every programs-th row, or block of rows, and keeps its part of dweight in
float32 registers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _columns, _compat, _launch, reference
from ._blocks import Block, Exchange, Meeting
from ._pipeline import Pipeline
from ._spec import Spec
from .regimes import BackwardPlan, Regime, Source, pipeline_tile

F32 = jnp.float32
Chunks = list[jax.Array]
Rows = dict[str, Chunks]  # x, dy, and in the residual form ds


def _gradient(
    block: Block,
    read: Callable[[], Rows],
    scales: Callable[[], Sequence[Any]],
    partial: Chunks | None,
    *,
    rstd_ref: Any,
    dx_ref: Any,
    spec: Spec,
    when_met: Callable[[], None] = lambda: None,
) -> Chunks | None:
    """Writes dx of the block's rows; returns `partial` with their dweight added. Reads the rows once for the sum,
    once for dx."""
    dtype = dx_ref.dtype
    rstd = block.spread(block.load_rows(rstd_ref))

    def unit_and_g(x: jax.Array, dy: jax.Array, scale: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        g = dy.astype(F32) if scale is None else dy.astype(F32) * scale
        return x.astype(F32) * rstd, g.astype(dtype).astype(F32) if spec.cast_before_scale else g

    rows = read()
    products = []
    for x, dy, scale in zip(rows["x"], rows["dy"], scales(), strict=True):
        unit, g = unit_and_g(x, dy, scale)
        products.append(g * unit)
    mean = block.spread(block.row_sum(products) / block.plan.n)
    when_met()

    rows = read()
    dxs, partials = [], []
    for i, (x, dy, scale) in enumerate(zip(rows["x"], rows["dy"], scales(), strict=True)):
        unit, g = unit_and_g(x, dy, scale)
        dx = (rstd * (g - unit * mean)).astype(dtype)
        if "ds" in rows:  # the gradient that reaches s from elsewhere, added after dx was rounded, as autograd does
            dx = (dx.astype(F32) + rows["ds"][i].astype(F32)).astype(dtype)
        dxs.append(dx)
        if partial is not None:
            factor = unit.astype(dtype).astype(F32) if spec.cast_before_scale else unit
            partials.append(partial[i] + dy.astype(F32) * factor)
    block.store(dx_ref, dxs)
    return None if partial is None else partials


def _every_row(
    plan: BackwardPlan,
    exchange: Exchange | None,
    sources: dict[str, Any],
    scratch: dict[str, Any],
    gradient: Callable[..., Chunks | None],
    columns: Callable[[Block], tuple[Callable[[], Sequence[Any]], Chunks | None]],
    *,
    program: jax.Array,
    programs: Any,
    count: Any,
    interpret: bool,
) -> tuple[Block, Chunks | None]:
    """`gradient` for every programs-th of `count` blocks; returns a block and this program's part of dweight."""
    steps = lax.div(count - program + (programs - 1), jnp.int32(programs))

    def at(step: Any) -> Any:
        return program + step * programs

    def block_of(step: Any) -> Block:
        return _launch.block(plan, at(step), exchange, lax.rem(step, jnp.int32(_launch.SLOTS)), interpret=interpret)

    def load(step: Any) -> Rows:
        return {name: block_of(step).load(source) for name, source in sources.items()}

    first = block_of(jnp.int32(0))
    scales, zeros = columns(first)

    if plan.source is Source.PIPELINE:
        buffers = {name: scratch[name + "_stages"] for name in sources}
        several = plan.warpgroups > 1
        pipeline = Pipeline(sources, buffers, scratch["arrived"], plan.stages, several, at, steps)
        pipeline.start()

        def from_stages(step: jax.Array, partial: Chunks | None) -> Chunks | None:
            block, stage = block_of(step), pipeline.wait(step)

            def read() -> Rows:
                return {name: block.load_stage(ref) for name, ref in stage.items()}

            return gradient(block, read, scales, partial, when_met=lambda: pipeline.refill(step))

        return first, lax.fori_loop(0, steps, from_stages, zeros)

    if plan.source is Source.MEMORY:

        def from_memory(step: jax.Array, partial: Chunks | None) -> Chunks | None:
            return gradient(block_of(step), functools.partial(load, step), scales, partial)

        return first, lax.fori_loop(0, steps, from_memory, zeros)

    def from_registers(step: jax.Array, carry: tuple[Chunks | None, Rows]) -> tuple[Chunks | None, Rows]:
        partial, rows = carry
        following = load(jnp.minimum(step + 1, steps - 1))  # in flight while this block is worked on
        return gradient(block_of(step), lambda: rows, scales, partial), following

    partial, _ = lax.fori_loop(0, steps, from_registers, (zeros, load(jnp.int32(0))))
    return first, partial


def backward(
    operands: dict[str, jax.Array],
    *,
    plan: BackwardPlan,
    spec: Spec,
    with_dweight: bool,
    dweight_dtype: Any = F32,
    interpret: bool,
) -> dict[str, jax.Array]:
    """dx, on request dweight, rounded to dweight_dtype; of x (rows, n), rstd, dy, and where given weight and ds."""
    results = parts(operands, plan=plan, spec=spec, with_dweight=with_dweight, interpret=interpret)
    if with_dweight:
        used = parts_of(plan, operands["x"].shape[0])
        results["dweight"] = _columns.column_sum(results["dweight"], used, dweight_dtype, interpret=interpret)
    return results


def parts_of(plan: BackwardPlan, rows: int) -> int:
    """Programs, each with its part of dweight, that work on `rows` rows."""
    return _launch.counts_of(plan, rows)[2]


def parts(
    operands: dict[str, jax.Array], *, plan: BackwardPlan, spec: Spec, with_dweight: bool, interpret: bool
) -> dict[str, jax.Array]:
    """As backward, but of dweight the part of each program, in the first parts_of(...) rows.

    The operands of `_launch.COUNTS` make the row count one of the launch, as in the forward pass.
    """
    x = operands["x"]
    nominal_rows, n = x.shape
    if interpret:
        # 0.10's interpreter loses track of a weight that several threads load in a loop.
        plan = dataclasses.replace(_launch.interpretable(plan), keeps_weight=True)
    outputs = {"dx": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    if with_dweight:
        outputs["dweight"] = jax.ShapeDtypeStruct((max(parts_of(plan, nominal_rows), _columns.TILE), n), F32)
    names = [name for name in ("x", "dy", "ds") if name in operands]
    inputs, scratch = dict(operands), {}
    if with_dweight and plan.regime is Regime.WARP:
        scratch |= {"met_rows": _compat.smem((plan.block, plan.span), F32), "met": _compat.barrier(1)}
    if plan.source is Source.PIPELINE:
        shape = pipeline_tile(n, x.dtype.itemsize)
        assert shape is not None
        inputs |= {name: operands[name].reshape(nominal_rows, *shape) for name in names}
        scratch |= {f"{name}_stages": _compat.smem((plan.stages, *shape), operands[name].dtype) for name in names}
        scratch["arrived"] = _compat.barrier(len(names), plan.stages)

    def body(
        exchange: Exchange | None,
        *,
        dx_ref: Any,
        rstd_ref: Any,
        weight_ref: Any = None,
        dweight_ref: Any = None,
        **refs: Any,
    ) -> None:
        counts, refs = _launch.counts_and_rows(refs)
        extent = _launch.extent(plan, nominal_rows, counts, interpret=interpret)
        own = {name: refs.pop(name) for name in scratch}
        sources = {name: refs[f"{name}_ref"] for name in names}
        gradient = functools.partial(_gradient, rstd_ref=rstd_ref, dx_ref=dx_ref, spec=spec)
        program = lax.axis_index("program")

        def columns(block: Block) -> tuple[Callable[[], Sequence[Any]], Chunks | None]:
            def scales() -> Sequence[Any]:
                if weight_ref is None:
                    return [None] * block.plan.chunks
                return [reference.scale(weight, spec.weight_offset) for weight in block.columns(weight_ref)]

            kept = scales() if plan.keeps_weight else None
            return (scales if kept is None else lambda: kept), block.zeros() if with_dweight else None

        def finish(block: Block, partial: Chunks | None) -> None:
            if partial is not None:
                meeting = Meeting(own["met_rows"], own["met"]) if "met" in own else None
                block.store_columns(dweight_ref.at[program], partial, meeting)

        def full(program: jax.Array) -> None:
            share = {"program": program, "programs": extent.programs, "count": extent.blocks}
            finish(*_every_row(plan, exchange, sources, own, gradient, columns, **share, interpret=interpret))

        def one_row(block: Block) -> None:
            rows = {name: block.load(source) for name, source in sources.items()}
            finish(block, gradient(block, lambda: rows, *columns(block)))

        _launch.for_each_program(plan, extent, full, one_row=one_row, interpret=interpret)

    grid = parts_of(plan, nominal_rows)
    return _launch.launch(body, plan, grid, inputs, outputs, scratch=scratch, interpret=interpret)
