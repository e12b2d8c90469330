"""The backward kernel: dx, and each program's part of dweight, which one sum adds up in a fixed order.

The grid is persistent: a program takes every programs-th row, or block of rows, and keeps its part of dweight in
float32 registers.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import reference
from .._spec import Spec
from ..plans.plan import BackwardPlan, Regime, Source
from . import dweight_sum, grid, launch, mosaic
from .block import Block, Meeting
from .cta import Exchange
from .pipeline import Pipeline, staged

F32 = jnp.float32
Chunks = list[jax.Array]
Rows = dict[str, Chunks]  # x, dy, and in the residual form ds
Sums = tuple[jax.Array, jax.Array]  # of a block's rows, rstd and the sum of g * unit


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """Of a block's rows, in two steps, each of which reads the rows. scales(): of the columns."""

    rstd_ref: Any
    dx_ref: Any
    spec: Spec

    def _unit_and_g(
        self, block: Block, rows: Rows, scales: Sequence[Any], rstd: jax.Array
    ) -> Iterator[tuple[jax.Array, jax.Array]]:
        dtype = self.dx_ref.dtype
        for x, dy, scale in zip(rows["x"], rows["dy"], scales, strict=True):
            g = dy.astype(F32) if scale is None else dy.astype(F32) * scale
            yield block.widened(x) * rstd, block.widened(g.astype(dtype)) if self.spec.cast_before_scale else g

    def begin(
        self, block: Block, rows: Rows, scales: Sequence[Any], partial: Chunks | None
    ) -> tuple[Sums, Chunks | None]:
        """The begun sums, and `partial` with the rows' dweight added."""
        rstd = block.load_rows(self.rstd_ref)
        products, partials = [], []
        for i, (unit, g) in enumerate(self._unit_and_g(block, rows, scales, block.spread(rstd))):
            products.append(g * unit)
            if partial is not None:
                factor = block.rounded(unit, self.dx_ref.dtype) if self.spec.cast_before_scale else unit
                partials.append(partial[i] + block.widened(rows["dy"][i]) * factor)
        return (rstd, block.begin_sum(products)), None if partial is None else partials

    @staticmethod
    def end(block: Block, begun: Sums) -> Sums:
        rstd, total = begun
        return rstd, block.end_sum(total)

    def finish(self, block: Block, rows: Rows, scales: Sequence[Any], sums: Sums) -> None:
        """Writes dx."""
        rstd, mean = block.spread(sums[0]), block.spread(sums[1] / block.plan.n)
        dxs = []
        for i, (unit, g) in enumerate(self._unit_and_g(block, rows, scales, rstd)):
            dx = (rstd * (g - unit * mean)).astype(self.dx_ref.dtype)
            if "ds" in rows:  # the gradient that reaches s from elsewhere, added after dx was rounded, as autograd does
                dx = (dx.astype(F32) + rows["ds"][i].astype(F32)).astype(self.dx_ref.dtype)
            dxs.append(dx)
        block.store(self.dx_ref, dxs)


def _every_row(
    plan: BackwardPlan,
    exchange: Exchange | None,
    sources: dict[str, Any],
    scratch: dict[str, Any],
    gradient: _Gradient,
    columns: Callable[[Block], tuple[Callable[[], Sequence[Any]], Chunks | None]],
    share: grid.Share,
    *,
    interpret: bool,
) -> tuple[Block, Chunks | None]:
    """The gradients of each block of `share`; returns a block and this program's part of dweight."""

    def block_of(step: Any) -> Block:
        slot = lax.rem(step, jnp.int32(grid.SLOTS))
        return grid.block(plan, share.at(step), exchange, slot, interpret=interpret)

    def load(block: Block) -> Rows:
        return {name: block.load(source) for name, source in sources.items()}

    first = block_of(jnp.int32(0))
    scales, zeros = columns(first)

    if plan.source is Source.PIPELINE:
        buffers = {name: scratch[f"{name}_stages"] for name in sources}
        pipeline = Pipeline(sources, buffers, scratch["arrived"], plan, share.at, share.steps)
        pipeline.start()

        def row(
            step: jax.Array, stage: dict[str, Any], met: Callable[[], None], partial: Chunks | None
        ) -> Chunks | None:
            block = block_of(step)

            def read() -> Rows:
                return {name: block.load_stage(ref) for name, ref in stage.items()}

            rows = read() if plan.keeps_rows else None
            again = read if rows is None else lambda: rows
            if plan.regime is Regime.WARP:  # the warps share no sum in which they meet
                mosaic.arrive_and_wait(scratch["read"])
                met()
            begun, partial = gradient.begin(block, again(), scales(), partial)
            if plan.regime is Regime.CTA:
                met()
            sums = gradient.end(block, begun)
            gradient.finish(block, again(), scales(), sums)
            return partial

        return first, pipeline.each_row(row, zeros)

    if plan.source is Source.MEMORY:

        def from_memory(step: jax.Array, partial: Chunks | None) -> Chunks | None:
            block = block_of(step)
            begun, partial = gradient.begin(block, load(block), scales(), partial)
            gradient.finish(block, load(block), scales(), gradient.end(block, begun))
            return partial

        return first, lax.fori_loop(0, share.steps, from_memory, zeros)

    def from_registers(step: jax.Array, carry: tuple[Chunks | None, Rows]) -> tuple[Chunks | None, Rows]:
        partial, rows = carry
        following = load(block_of(jnp.minimum(step + 1, share.steps - 1)))  # in flight while this block is worked on
        block = block_of(step)
        begun, partial = gradient.begin(block, rows, scales(), partial)
        gradient.finish(block, rows, scales(), gradient.end(block, begun))
        return partial, following

    partial, _ = lax.fori_loop(0, share.steps, from_registers, (zeros, load(block_of(jnp.int32(0)))))
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
        results["dweight"] = dweight_sum.column_sum(results["dweight"], used, dweight_dtype, interpret=interpret)
    return results


def parts_of(plan: BackwardPlan, rows: int) -> int:
    """Programs, each with its part of dweight, that work on `rows` rows."""
    return grid.counts_of(plan, rows)[2]


def parts(
    operands: dict[str, jax.Array], *, plan: BackwardPlan, spec: Spec, with_dweight: bool, interpret: bool
) -> dict[str, jax.Array]:
    """As backward, but of dweight the part of each program, in the first parts_of(...) rows.

    The operands of `grid.COUNTS` make the row count one of the launch, as in the forward pass.
    """
    x = operands["x"]
    nominal_rows, n = x.shape
    if interpret:
        # 0.10's interpreter loses track of a weight that several threads load in a loop.
        plan = dataclasses.replace(launch.interpretable(plan, x.dtype.itemsize), keeps_weight=True)
    outputs = {"dx": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    if with_dweight:
        outputs["dweight"] = jax.ShapeDtypeStruct((max(parts_of(plan, nominal_rows), dweight_sum.TILE), n), F32)
    names = [name for name in ("x", "dy", "ds") if name in operands]
    inputs, scratch = dict(operands), {}
    if with_dweight and plan.regime is Regime.WARP:
        scratch |= {"met_rows": mosaic.smem((plan.block, plan.span), F32), "met": mosaic.barrier(1)}
    if plan.source is Source.PIPELINE:
        views, buffers = staged(plan, operands, names)
        inputs |= views
        scratch |= buffers
        if plan.regime is Regime.WARP:
            scratch["read"] = mosaic.barrier(1)

    def body(
        exchange: Exchange | None,
        *,
        dx_ref: Any,
        rstd_ref: Any,
        weight_ref: Any = None,
        dweight_ref: Any = None,
        **refs: Any,
    ) -> None:
        counts, refs = grid.counts_and_rows(refs)
        extent = grid.extent(plan, nominal_rows, counts, interpret=interpret)
        own = {name: refs.pop(name) for name in scratch}
        sources = {name: refs[f"{name}_ref"] for name in names}
        gradient = _Gradient(rstd_ref, dx_ref, spec)
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
            share = grid.Share(program, extent.programs, extent.blocks)
            finish(*_every_row(plan, exchange, sources, own, gradient, columns, share, interpret=interpret))

        def one_row(block: Block) -> None:
            def load(source: Any) -> Chunks:
                staged = plan.source is Source.PIPELINE  # the row has the shape of a stage then
                return block.load_stage(source.at[block.row]) if staged else block.load(source)

            rows = {name: load(source) for name, source in sources.items()}
            scales, zeros = columns(block)
            begun, partial = gradient.begin(block, rows, scales(), zeros)
            gradient.finish(block, rows, scales(), gradient.end(block, begun))
            finish(block, partial)

        grid.for_each_program(plan, extent, full, one_row=one_row, interpret=interpret)

    return launch.launch(
        body, plan, parts_of(plan, nominal_rows), inputs, outputs, scratch=scratch, interpret=interpret
    )
