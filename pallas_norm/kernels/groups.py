"""The scales of groups of neighbouring elements, from a chunk to memory: one lane of each group writes."""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .._compat import arith, ir, llvm, memref, plgpu, vector
from ..plans.plan import Plan

STORE = "{ .reg .pred p; setp.eq.u32 p, $2, 0; @p st.global.f32 [$0], $1; }"


def store(
    ref: Any,
    row: Any,
    start: Any,
    chunk: jax.Array,
    layout: Any,
    group: int,
    plan: Plan,
    *,
    one_row: bool,
    interpret: bool,
) -> None:
    """Of a chunk from column `start` on, whose groups have one value each, to a (rows, n // group) reference; `row` is
    the first one, in an interpreter all of them."""
    shape, groups = chunk.shape, plan.n // group
    if interpret:
        count = plan.span // group
        at = pl.ds(lax.div(jnp.int32(start), jnp.int32(group)), count)
        ref[row, at] = chunk.reshape(count, group)[:, 0] if one_row else chunk.reshape(-1, count, group)[:, :, 0]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), plgpu.Layout.WG_SPLAT(()), layout))
    def inline(_: Any, ref: Any, row: Any, start: Any, chunk: Any) -> None:
        i32, i64 = (ir.IntegerType.get_signless(width) for width in (32, 64))
        base = arith.index_cast(i64, memref.extract_aligned_pointer_as_index(ref))
        row, start = (scalar.registers.item() for scalar in (row, start))
        indices = chunk.layout.thread_idxs(shape)
        for register, index in zip(chunk.registers.flat, indices, strict=True):
            *leading, column = (arith.index_cast(i32, part) for part in index)
            of_row = row
            if leading and one_row:
                column = arith.addi(column, arith.muli(leading[0], arith.constant(i32, shape[1])))
            elif leading:
                of_row = arith.addi(row, leading[0])
            column = arith.addi(column, start)
            size = arith.constant(i32, group)
            wide = arith.muli(arith.extui(i64, of_row), arith.constant(i64, groups))
            at = arith.addi(wide, arith.extui(i64, arith.divui(column, size)))
            address = arith.addi(base, arith.muli(at, arith.constant(i64, 4)))
            value = vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))
            operands = [address, value, arith.remui(column, size)]
            llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, STORE, "l,f,r,~{memory}", has_side_effects=True)

    inline(ref, jnp.int32(row), jnp.int32(start), chunk)
