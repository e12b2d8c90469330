"""The forward kernel: y, and on request rstd and the rounded sum x + residual."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _launch, reference
from ._blocks import Block, Exchange
from ._spec import Spec
from .regimes import Plan

F32 = jnp.float32


def _body(
    block: Block,
    *,
    x_ref: Any,
    residual_ref: Any = None,
    weight_ref: Any = None,
    y_ref: Any,
    s_ref: Any = None,
    rstd_ref: Any = None,
    spec: Spec,
) -> None:
    dtype = x_ref.dtype

    def load_weights() -> list[Any]:
        if weight_ref is None:
            return [None] * block.plan.chunks
        return [reference.scale(weight, spec.weight_offset) for weight in block.columns(weight_ref)]

    def load_rows() -> list[jax.Array]:
        xs = block.load(x_ref)
        if residual_ref is None:
            return xs
        return [
            (x.astype(F32) + r.astype(F32)).astype(dtype) for x, r in zip(xs, block.load(residual_ref), strict=True)
        ]

    # A row that registers cannot hold is read twice. Elsewhere the weight is loaded first, so that it arrives with
    # the row.
    weights = None if block.plan.rereads else load_weights()
    xs = load_rows()
    sum_sq = block.row_sum([x.astype(F32) * x.astype(F32) for x in xs])
    rstd = lax.rsqrt(sum_sq / block.plan.n + spec.eps)  # n, not the padded width
    if weights is None:
        weights, xs = load_weights(), load_rows()
    scale = block.spread(rstd)
    ys = []
    for x, weight in zip(xs, weights, strict=True):
        unit = x.astype(F32) * scale
        if spec.cast_before_scale:
            unit = unit.astype(dtype).astype(F32)  # Hugging Face rounds here, before the weight
        ys.append((unit if weight is None else unit * weight).astype(y_ref.dtype))
    block.store(y_ref, ys)
    if s_ref is not None:
        block.store(s_ref, xs)
    if rstd_ref is not None:
        block.store_rows(rstd_ref, rstd)


def forward(
    operands: dict[str, jax.Array], *, plan: Plan, spec: Spec, with_rstd: bool, interpret: bool
) -> dict[str, jax.Array]:
    """y, with a residual also s, on request rstd; of x (rows, n), and where given residual and weight. One program a
    block.

    The operands of `_launch.COUNTS` make the row count one of the launch, and those that `_launch.counts_and_rows`
    knows the strides of the rows; the shape of x then bounds nothing.
    """
    x, weight = operands["x"], operands.get("weight")
    if interpret:
        plan = _launch.interpretable(plan)
    outputs = {
        "y": jax.ShapeDtypeStruct(x.shape, reference.result_dtype(x.dtype, None if weight is None else weight.dtype))
    }
    if "residual" in operands:
        outputs["s"] = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if with_rstd:
        outputs["rstd"] = jax.ShapeDtypeStruct(x.shape[:1], F32)

    def body(exchange: Exchange | None, **refs: Any) -> None:
        counts, refs = _launch.counts_and_rows(refs)
        extent = _launch.extent(plan, len(x), counts, interpret=interpret)

        def full(program: jax.Array) -> None:
            _body(_launch.block(plan, program, exchange, 0, interpret=interpret), **refs, spec=spec)

        one_row = functools.partial(_body, **refs, spec=spec)
        _launch.for_each_program(plan, extent, full, one_row=one_row, interpret=interpret)

    _, _, programs = _launch.counts_of(plan, len(x))
    return _launch.launch(body, plan, programs, operands, outputs, interpret=interpret)
