"""The forward kernel: y, and on request rstd and the rounded sum x + residual."""

# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import reference
from .._spec import Spec
from ..plans.plan import Plan, Source
from . import grid, launch
from .block import Block
from .cta import Exchange
from .pipeline import Pipeline, staged

F32 = jnp.float32


def _scales(block: Block, weight_ref: Any, spec: Spec) -> list[Any]:
    if weight_ref is None:
        return [None] * block.plan.chunks
    return [reference.scale(weight, spec.weight_offset) for weight in block.columns(weight_ref)]


def _rows(load: Callable[[Any], list[jax.Array]], sources: Mapping[str, Any]) -> list[jax.Array]:
    """The chunks of x, or of s = x + residual."""
    xs = load(sources["x"])
    if "residual" not in sources:
        return xs
    residuals, dtype = load(sources["residual"]), xs[0].dtype
    return [(x.astype(F32) + r.astype(F32)).astype(dtype) for x, r in zip(xs, residuals, strict=True)]


def _squares(xs: list[jax.Array]) -> list[jax.Array]:
    return [x.astype(F32) * x.astype(F32) for x in xs]


def _write(
    block: Block,
    sum_sq: jax.Array,
    xs: Callable[[], list[jax.Array]],
    scales: Callable[[], list[Any]],
    *,
    y_ref: Any,
    s_ref: Any = None,
    rstd_ref: Any = None,
    spec: Spec,
) -> None:
    """The results of the block's rows."""
    rstd = lax.rsqrt(sum_sq / block.plan.n + spec.eps)  # n, not the padded width
    weights, rows = scales(), xs()
    scale = block.spread(rstd)
    ys = []
    for x, weight in zip(rows, weights, strict=True):
        unit = x.astype(F32) * scale
        if spec.cast_before_scale:
            unit = unit.astype(x.dtype).astype(F32)  # Hugging Face rounds here, before the weight
        ys.append((unit if weight is None else unit * weight).astype(y_ref.dtype))
    block.store(y_ref, ys)
    if s_ref is not None:
        block.store(s_ref, rows)
    if rstd_ref is not None:
        block.store_rows(rstd_ref, rstd)


def _one_block(block: Block, sources: Mapping[str, Any], weight_ref: Any, **results: Any) -> None:
    scales = functools.partial(_scales, block, weight_ref, results["spec"])
    read = functools.partial(_rows, block.load, sources)
    if block.plan.source is Source.MEMORY:  # registers cannot hold the row: it is read twice
        _write(block, block.row_sum(_squares(read())), read, scales, **results)
        return
    weights = scales()  # before the row, so that both arrive together
    xs = read()
    _write(block, block.row_sum(_squares(xs)), lambda: xs, lambda: weights, **results)


def _every_row(
    plan: Plan,
    exchange: Exchange | None,
    sources: Mapping[str, Any],
    scratch: Mapping[str, Any],
    weight_ref: Any,
    share: grid.Share,
    *,
    interpret: bool,
    **results: Any,
) -> None:
    """The rows of `share`, from shared memory, where bulk copies bring them ahead; the weight stays in registers."""

    def block_of(step: Any) -> Block:
        slot = lax.rem(step, jnp.int32(grid.SLOTS))
        return grid.block(plan, share.at(step), exchange, slot, interpret=interpret)

    buffers = {name: scratch[f"{name}_stages"] for name in sources}
    pipeline = Pipeline(sources, buffers, scratch["arrived"], plan, share.at, share.steps)
    pipeline.start()
    weights = _scales(block_of(jnp.int32(0)), weight_ref, results["spec"])

    def row(step: jax.Array, stage: Mapping[str, Any], met: Callable[[], None], nothing: None) -> None:
        block = block_of(step)
        read = functools.partial(_rows, block.load_stage, stage)
        xs = read()
        begun = block.begin_sum(_squares(xs))
        met()
        kept = (lambda: xs) if plan.keeps_rows else read
        _write(block, block.end_sum(begun), kept, lambda: weights, **results)
        return nothing

    pipeline.each_row(row, None)


def forward(
    operands: dict[str, jax.Array], *, plan: Plan, spec: Spec, with_rstd: bool, interpret: bool
) -> dict[str, jax.Array]:
    """y, with a residual also s, on request rstd; of x (rows, n), and where given residual and weight.

    The operands of `grid.COUNTS` make the row count one of the launch, and those that `grid.counts_and_rows`
    knows the strides of the rows; the shape of x then bounds nothing.
    """
    x, weight = operands["x"], operands.get("weight")
    if interpret:
        plan = launch.interpretable(plan, x.dtype.itemsize)
    outputs = {
        "y": jax.ShapeDtypeStruct(x.shape, reference.result_dtype(x.dtype, None if weight is None else weight.dtype))
    }
    if "residual" in operands:
        outputs["s"] = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if with_rstd:
        outputs["rstd"] = jax.ShapeDtypeStruct(x.shape[:1], F32)
    names = [name for name in ("x", "residual") if name in operands]
    inputs, scratch = dict(operands), {}
    if plan.source is Source.PIPELINE:
        views, scratch = staged(plan, operands, names)
        inputs |= views

    def body(exchange: Exchange | None, *, weight_ref: Any = None, **refs: Any) -> None:
        counts, refs = grid.counts_and_rows(refs)
        extent = grid.extent(plan, len(x), counts, interpret=interpret)
        own = {name: refs.pop(name) for name in scratch}
        sources = {name: refs.pop(f"{name}_ref") for name in names}
        results = {**refs, "spec": spec}

        def full(program: jax.Array) -> None:
            if plan.source is Source.PIPELINE:
                share = grid.Share(program, extent.programs, extent.blocks)
                _every_row(plan, exchange, sources, own, weight_ref, share, interpret=interpret, **results)
            else:
                _one_block(grid.block(plan, program, exchange, 0, interpret=interpret), sources, weight_ref, **results)

        def one_row(block: Block) -> None:
            _one_block(block, sources, weight_ref, **results)

        grid.for_each_program(plan, extent, full, one_row=one_row, interpret=interpret)

    _, _, programs = grid.counts_of(plan, len(x))
    return launch.launch(body, plan, programs, inputs, outputs, scratch=scratch, interpret=interpret)
