"""The backward kernel: dx, and each program's part of dweight, which one sum adds up in a fixed order.

The grid is persistent: a program takes every programs-th row, or block of rows, and keeps its part of dweight in
float32 registers.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._dtypes import AS_S, Dtypes, GradientDtypes
from .._row_sum import inverse
from .._spec import Spec
from ..plans.plan import BackwardPlan, Regime, Source
from . import dweight_sum, grid, launch, mosaic, weight
from .block import Block, Chunks, ColumnReduction
from .grid import CtaBlocks
from .pipeline import narrowest, staged
from .rows import Fetched, Reader, Rows, feed
from .weight import Factors, Weight

F32 = jnp.float32
Operands = dict[str, Chunks]  # x, dy, and in the residual form ds


class Refs(NamedTuple):
    rstd: Any  # a reference; or the block's own values, where they were just computed
    dx: Any
    dresidual: Any = None  # None where it is dx


def _units_and_g(
    block: Block, given: Operands, factors: Factors, scale: jax.Array, dtype: Any
) -> Iterator[tuple[jax.Array, jax.Array]]:
    # Two products that are rounded to 16 bits the compiler computes at once; others it would fuse with what follows.
    narrow = dtype != F32
    for x, dy, factor in zip(given["x"], given["dy"], factors, strict=True):
        g = dy.astype(F32)
        if factor is not None:
            g = g * factor if narrow else block.product(g, factor)
        yield block.widened(x) * scale, block.widened(block.narrowed(g, dtype))


def gradient(
    block: Block, rows: Rows[Operands], weight: Weight, partial: Chunks | None, refs: Refs, *, dtypes: Dtypes
) -> Chunks | None:
    """Writes dx of the block's rows; returns `partial` with their dweight added. x and ds are those of s."""
    given, factors = rows.first(block), weight.factors(block)
    rstd = refs.rstd if isinstance(refs.rstd, jax.Array) else block.load_rows(refs.rstd)
    scale = block.broadcast(rstd)
    products, partials = [], []
    for i, (unit, g) in enumerate(_units_and_g(block, given, factors, scale, dtypes.unit)):
        products.append(block.product(g, unit))
        if partial is not None:
            factor = block.rounded(unit, dtypes.unit)
            partials.append(partial[i] + block.widened(given["dy"][i]) * factor)
    begun = block.begin_sum(products)
    rows.all_read(block)
    weight.all_read(block)
    total = block.end_sum(begun)
    given, factors = rows.second(block, given), weight.factors(block)
    mean = block.broadcast(total * inverse(block.plan.n))
    dxs: Chunks = []
    for i, (unit, g) in enumerate(_units_and_g(block, given, factors, scale, dtypes.unit)):
        dx = block.narrowed(block.product(g - block.product(unit, mean), scale), dtypes.s)
        if "ds" in given:  # the gradient that reaches s from elsewhere, added after dx was rounded, as autograd does
            dx = block.narrowed(dx.astype(F32) + given["ds"][i].astype(F32), dtypes.s)
        dxs.append(dx)
    for ref in (refs.dx, refs.dresidual):
        if ref is not None:
            block.store(ref, [dx if dx.dtype == ref.dtype else dx.astype(F32).astype(ref.dtype) for dx in dxs])
    return None if partial is None else partials


def backward(
    operands: dict[str, jax.Array],
    *,
    plan: BackwardPlan,
    spec: Spec,
    with_dweight: bool,
    dweight_dtype: Any = F32,
    dx_dtypes: GradientDtypes = AS_S,
    interpret: bool,
) -> dict[str, jax.Array]:
    """dx, where it has another dtype dresidual, on request dweight, rounded to dweight_dtype; of x (rows, n), rstd, dy,
    and where given weight and ds."""
    options: Any = {"with_dweight": with_dweight, "dx_dtypes": dx_dtypes, "interpret": interpret}
    results = partial_dweights(operands, plan=plan, spec=spec, **options)
    if with_dweight:
        used = partial_dweight_rows(plan, len(operands["x"]))
        results["dweight"] = dweight_sum.column_sum(results["dweight"], used, dweight_dtype, interpret=interpret)
    return results


def partial_dweight_rows(plan: BackwardPlan, rows: int) -> int:
    """Programs, each with its part of dweight, that work on `rows` rows."""
    return grid.counts_of(plan, rows)[2]


def partial_dweights(
    operands: dict[str, jax.Array],
    *,
    plan: BackwardPlan,
    spec: Spec,
    with_dweight: bool,
    dx_dtypes: GradientDtypes = AS_S,
    interpret: bool,
) -> dict[str, jax.Array]:
    """As backward, but of dweight the part of each program, in the first partial_dweight_rows(...) rows.

    With LaunchArguments among the operands the row count is one of the launch, as in the forward pass.
    """
    x = operands["x"]
    dtypes = spec.dtypes(x.dtype, weight=operands["weight"].dtype if "weight" in operands else None)
    names = [name for name in ("x", "dy", "ds") if name in operands]
    outputs = {"dx": jax.ShapeDtypeStruct(x.shape, dx_dtypes.dx or x.dtype)}
    if dx_dtypes.dresidual is not None:
        outputs["dresidual"] = jax.ShapeDtypeStruct(x.shape, dx_dtypes.dresidual)

    def of_block(block: Block, rows: Rows[Operands], weight: Weight, partial: Chunks | None, refs: Any) -> Any:
        out = Refs(refs["rstd"], refs["dx"], refs.get("dresidual"))
        return gradient(block, rows, weight, partial, out, dtypes=dtypes)

    options: Any = {"spec": spec, "weight_dtype": dtypes.weight, "with_dweight": with_dweight, "interpret": interpret}
    return accumulated(of_block, operands, outputs, names, plan=plan, **options)


def accumulated(
    gradient: Callable[[Block, Rows[Operands], Weight, Chunks | None, dict[str, Any]], Chunks | None],
    operands: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    names: Sequence[str],
    *,
    plan: BackwardPlan,
    spec: Spec,
    weight_dtype: Any,
    with_dweight: bool,
    least: int = dweight_sum.TILE,
    interpret: bool,
) -> dict[str, jax.Array]:
    """The outputs, which `gradient` writes of each block, and what it adds up: the part of each program, of `least`
    programs or more. names: of the operands that have rows."""
    nominal_rows, n = operands["x"].shape
    if interpret:
        # 0.10's interpreter loses track of a weight that several threads load in a loop.
        plan = dataclasses.replace(launch.interpretable(plan, narrowest(operands, names)), keeps_weight=True)
    if with_dweight:
        programs = max(partial_dweight_rows(plan, nominal_rows), least)
        outputs = outputs | {"dweight": jax.ShapeDtypeStruct((programs, n), F32)}
    inputs, stages = staged(plan, operands, names)
    scratch: dict[str, Any] = {}
    if with_dweight and plan.regime is Regime.WARP:
        scratch |= {"column_rows": mosaic.smem((plan.block, plan.span), F32), "column_barrier": mosaic.barrier(1)}
    scratch |= stages

    def work(refs: dict[str, Any]) -> tuple[launch.Full, launch.LeftOver]:
        reader = Reader({name: refs[name] for name in names}, lambda _, given: given)

        def columns(block: Block) -> tuple[Weight, Chunks | None]:
            options: Any = {"offset": spec.weight_offset, "dtype": weight_dtype, "kept": plan.keeps_weight}
            factors = weight.of(block, refs.get("weight"), **options)
            return factors, block.zeros() if with_dweight else None

        def finish(block: Block, partial: Chunks | None, program: Any) -> None:
            if partial is not None:
                reduction = (
                    ColumnReduction(refs["column_rows"], refs["column_barrier"]) if "column_barrier" in refs else None
                )
                block.store_columns(refs["dweight"].at[program], partial, reduction)

        def full(blocks: CtaBlocks) -> None:
            factors, zeros = columns(blocks.first)
            rows = feed(blocks, reader, refs)
            partial = rows.each(lambda block, rows, partial: gradient(block, rows, factors, partial, refs), zeros)
            finish(blocks.first, partial, blocks.program)

        def left_over(block: Block, program: Any) -> None:
            rows = Fetched(reader.read_left_over(block, viewed=plan.source is Source.PIPELINE))
            factors, zeros = columns(block)
            finish(block, gradient(block, rows, factors, zeros, refs), program)

        return full, left_over

    return launch.launch(work, plan, nominal_rows, inputs, outputs, scratch=scratch, interpret=interpret)
